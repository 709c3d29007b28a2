# SPDX-License-Identifier: Apache-2.0
"""Early exit without verification: serve a model cut after its first E layers.

A request is a key of ``hf_overrides`` (``--early-exit-layer`` sets it). It becomes overrides
that vLLM itself understands, so that vLLM builds, loads and caches a model of E layers; the
class in ``models/early_exit.py`` skips the weights of the others.

Pure functions over plain values, free of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES, early_exit_architectures
from vllm_layerskip.config.request import METHOD, SELF

KEY = "early_exit_layer"
FLAG = "--early-exit-layer"
NUM_CHECKPOINT_LAYERS = "num_checkpoint_layers"
"""Key of the cut config that keeps L, for the log."""


@dataclass(frozen=True)
class EarlyExitRequest:
    """What a user asked for, not yet checked against a model."""

    exit_layer: object
    source: str
    """How the user wrote it, for messages."""
    other_overrides: Mapping[str, Any]
    """``hf_overrides`` without the request."""


def find_request(hf_overrides: object) -> EarlyExitRequest | None:
    """The request in ``hf_overrides``, or None.

    A ``layerskip`` block of the checkpoint is no request: it names the layer that drafts.
    """
    if not isinstance(hf_overrides, Mapping):
        return None  # A callable cannot be inspected; it counts as no request.
    others = dict(hf_overrides)
    exit_layer = others.pop(KEY, None)
    if exit_layer is None:
        return None
    return EarlyExitRequest(exit_layer, f"hf_overrides: {KEY}={exit_layer!r} ({FLAG})", others)


def refuse_speculation(
    request: EarlyExitRequest, speculative_config: Mapping[str, Any] | None
) -> None:
    """Refuse early exit together with speculation.

    Raises:
        ValueError: the engine would speculate.
    """
    if speculative_config:
        raise ValueError(
            f"{request.source} serves the first layers alone, without verification, and cannot go "
            f"with speculation (speculative_config={dict(speculative_config)!r}). Drop one: "
            f"without {KEY} and with method='{METHOD}' (--spec-model '{SELF}' --exit-layer E) the "
            "same layers draft and output stays exact."
        )


def cut_overrides(request: EarlyExitRequest, model_config: Any) -> dict[str, Any]:
    """``hf_overrides`` under which vLLM serves the first E layers of a model.

    Args:
        model_config: vLLM's config of the whole model.

    Raises:
        ValueError: the model or E is not supported; the message says what is valid.
    """
    architecture = model_config.architecture
    _check_model(request, model_config, architecture)
    num_layers = model_config.get_total_num_hidden_layers()
    exit_layer = _check_exit_layer(request, num_layers)
    return {
        **request.other_overrides,
        "architectures": [early_exit_architectures()[architecture]],
        "num_hidden_layers": exit_layer,
        **per_layer_values(model_config.hf_config.to_dict(), num_layers, exit_layer),
        KEY: exit_layer,
        NUM_CHECKPOINT_LAYERS: num_layers,
    }


def _check_model(request: EarlyExitRequest, model_config: Any, architecture: str) -> None:
    if model_config.model_impl not in ("auto", "vllm"):
        raise ValueError(
            f"{request.source}: early exit cuts vLLM's own model classes; model_impl="
            f"{model_config.model_impl!r} must be 'auto' or 'vllm'. Change it."
        )
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{request.source}: early exit does not support the architecture {architecture!r} of "
            f"model {model_config.model!r}. Supported: "
            f"{', '.join(sorted(SUPPORTED_ARCHITECTURES))}. Drop it, or use a supported model."
        )
    if model_config.runner_type != "generate":
        raise ValueError(
            f"{request.source}: early exit serves a model that generates text, but the engine runs "
            f"with runner={model_config.runner_type!r}. Drop it, or set runner='generate'."
        )


def _check_exit_layer(request: EarlyExitRequest, num_layers: int) -> int:
    exit_layer = request.exit_layer
    if (
        isinstance(exit_layer, int)
        and not isinstance(exit_layer, bool)
        and 1 <= exit_layer < num_layers
    ):
        return exit_layer
    valid = (
        f"must be an integer from 1 to {num_layers - 1} (the model has {num_layers} layers; to "
        "serve them all, leave it out)"
        if num_layers > 1
        else f"has no valid value for a model of {num_layers} layer(s). Leave it out"
    )
    raise ValueError(f"{request.source} {valid}.")


def per_layer_values(
    hf_config: Mapping[str, Any], num_layers: int, exit_layer: int
) -> dict[str, Any]:
    """The per-layer values of ``config.json`` (``layer_types``, ...), for the first E layers.

    A list is per layer if its name has ``layer`` in it and it has one value for each layer.
    """
    values: dict[str, Any] = {
        key: value[:exit_layer]
        for key, value in hf_config.items()
        if "layer" in key and isinstance(value, list | tuple) and len(value) == num_layers
    }
    # Qwen2: layers from this index on have a sliding window, if any has.
    if isinstance(first := hf_config.get("max_window_layers"), int):
        values["max_window_layers"] = min(first, exit_layer)
    return values
