# SPDX-License-Identifier: Apache-2.0
"""vLLM's own model classes, loading only the first layers of a checkpoint.

Their config says E layers (``config/early_exit.py``), so layers E and up have neither parameters
nor a KV cache. The classes here skip the weights of those layers.

There is a class ``EarlyExit<architecture>`` for each supported architecture. It is made when it is
asked for: importing all of vLLM's classes to use one would be slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.registry import ModelRegistry

from vllm_layerskip.architectures import early_exit_architectures
from vllm_layerskip.config.early_exit import KEY, NUM_CHECKPOINT_LAYERS

logger = init_logger("vllm.layerskip.early_exit")

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class EarlyExit(nn.Module):
    """Mixin before a ``*ForCausalLM`` of vLLM that is cut at ``num_hidden_layers``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        hf_config = vllm_config.model_config.hf_config
        if not hasattr(hf_config, NUM_CHECKPOINT_LAYERS):
            raise ValueError(
                f"{type(self).__name__} is chosen by the plugin. Set hf_overrides={{'{KEY}': E}} "
                "and leave the checkpoint's architectures as they are."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.num_layers: int = hf_config.num_hidden_layers
        logger.warning_once(
            "LayerSkip early exit: layers 0..%d of %d are served, without verification "
            "(early_exit_layer %d). Output is lossy: it differs from the whole model's. "
            "--spec-model '[self]' --exit-layer %d is exact.",
            self.num_layers - 1,
            getattr(hf_config, NUM_CHECKPOINT_LAYERS),
            self.num_layers,
            self.num_layers,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load all weights but those of layers E and up."""
        return super().load_weights(
            (name, weight) for name, weight in weights if layer_of(name) < self.num_layers
        )


def layer_of(weight_name: str) -> int:
    """Index of the layer that a weight belongs to; -1 for embedding, final norm and LM head."""
    match = _LAYER.search(weight_name)
    return int(match[1]) if match else -1


def __getattr__(name: str) -> type[nn.Module]:
    """``EarlyExit<architecture>`` for ``name``."""
    for architecture, early_exit_architecture in early_exit_architectures().items():
        if name == early_exit_architecture:
            base = ModelRegistry.models[architecture].load_model_cls()
            cls = type(name, (EarlyExit, base), {"__module__": __name__, "__doc__": base.__doc__})
            globals()[name] = cls
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
