# SPDX-License-Identifier: Apache-2.0
"""The model that an adapter is for: its linear layers, and whether an adapter fits them.

The model is built from its config on torch's meta device: shapes without values, so that an
adapter is checked before weights load.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

FINAL_NORM = "model.norm"
TRANSLATOR = f"{FINAL_NORM}.translator"
"""A linear map behind the final norm of drafts, which the target has not."""

Shape = tuple[int, ...]

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def layer_of(module: str) -> int | None:
    """The index of the decoder layer that a module is in; None outside of them."""
    match = _LAYER.fullmatch(module)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Target:
    """The shapes of a target model."""

    name: str
    num_layers: int
    hidden_size: int
    linears: dict[str, Shape]
    """``(outputs, inputs)`` of the linear layers in decoder layers, by full name."""

    @property
    def module_names(self) -> list[str]:
        """Names of linear layers in a decoder layer, for messages."""
        found = (_LAYER.fullmatch(name) for name in self.linears)
        return list(dict.fromkeys(match[2] for match in found if match))

    def check_linear(self, module: str, a: Shape, b: Shape, made_for: str | None) -> None:
        """Check one pair of low-rank weights.

        Args:
            made_for: the name of the adapter's own base model, if it is known.

        Raises:
            ValueError: the target has no such layer, or one of another shape.
        """
        layer, expected = layer_of(module), self.linears.get(module)
        if layer is not None and layer >= self.num_layers:
            fault = f"it adapts {module!r}, and the target has {self.num_layers} layers"
        elif expected is None:
            names = ", ".join(self.module_names)
            fault = f"it adapts {module!r}, and the target's layers have {names}"
        elif len(a) != 2 or len(b) != 2 or (b[0], a[1]) != expected:
            fault = (
                f"{module!r} has A {list(a)} and B {list(b)}, and the target has {expected[1]} "
                f"inputs and {expected[0]} outputs there (hidden size {self.hidden_size})"
            )
        else:
            return
        raise self._misfit(fault, made_for)

    def check_final_norm(self, shape: Shape, made_for: str | None) -> None:
        """Check the weight of the final norm, as ``check_linear`` does.

        Raises:
            ValueError: it has another shape.
        """
        if shape != (self.hidden_size,):
            raise self._misfit(
                f"its final norm has shape {list(shape)}, and the target's has "
                f"[{self.hidden_size}]",
                made_for,
            )

    def check_translator(self, shape: Shape, made_for: str | None) -> None:
        """Check the weight of the exit translator, as ``check_linear`` does.

        Raises:
            ValueError: it has another shape.
        """
        if shape != (self.hidden_size, self.hidden_size):
            raise self._misfit(
                f"its exit translator has shape {list(shape)}, and the target's hidden size is "
                f"{self.hidden_size}",
                made_for,
            )

    def _misfit(self, fault: str, made_for: str | None) -> ValueError:
        model = repr(made_for) if made_for else "another model"
        return ValueError(
            f"it was made for {model}, and the target is {self.name!r}: {fault}. Give an adapter "
            "that was trained on the target."
        )


def target_of(hf_config: Any, name: str, num_layers: int) -> Target:
    """The target of a config of transformers.

    Raises:
        ValueError: transformers builds no model from it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(hf_config), trust_remote_code=False
            )
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"transformers builds no model from the config of {name!r} ({error}), so that no "
            "adapter for it can be checked. Leave the adapter out."
        ) from None
    linears: dict[str, Shape] = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and layer_of(path) is not None
    }
    return Target(name, num_layers, int(hf_config.hidden_size), linears)
