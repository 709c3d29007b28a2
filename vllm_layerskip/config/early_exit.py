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
from vllm_layerskip.config.options import METHOD, SELF

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
    named_architecture: str | None
    """The LayerSkip class that ``architectures`` names, if it does."""


def find_request(hf_overrides: object) -> EarlyExitRequest | None:
    """The request in ``hf_overrides``, or None.

    Two spellings: ``{"early_exit_layer": E}``, and ``{"architectures":
    ["LayerSkip...ForCausalLM"], "exit_layer": E}``. A ``layerskip`` block of the checkpoint is no
    request: it names the layer that drafts.

    Raises:
        ValueError: both spellings at once.
    """
    if not isinstance(hf_overrides, Mapping):
        return None  # A function: what it sets is the checkpoint's config as far as we know.
    others = dict(hf_overrides)
    named = _named_architecture(others)
    exit_layer, spelling = others.pop(KEY, None), KEY
    if named is not None and "exit_layer" in others:
        if exit_layer is not None:
            raise ValueError(
                f"hf_overrides: {KEY}={exit_layer!r} ({FLAG}) and architectures=[{named!r}] with "
                f"exit_layer={others['exit_layer']!r} say the same twice. Give one."
            )
        exit_layer, spelling = others.pop("exit_layer"), "exit_layer"
    if exit_layer is None:
        return None
    if named is not None:
        del others["architectures"]
    source = f"hf_overrides: {spelling}={exit_layer!r}"
    if spelling == KEY:
        source += f" ({FLAG})"
    return EarlyExitRequest(exit_layer, source, others, named)


def _named_architecture(hf_overrides: Mapping[str, Any]) -> str | None:
    own = {model.architecture for model in SUPPORTED_ARCHITECTURES.values()}
    named = hf_overrides.get("architectures") or [None]
    return named[0] if named[0] in own else None


def refuse_speculation(
    request: EarlyExitRequest, speculative_config: Mapping[str, Any] | None
) -> None:
    """Early exit and speculation exclude each other.

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
        model_config: vLLM's, of the whole model.

    Raises:
        ValueError: the model or E is not supported; the message says what is.
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
    model = SUPPORTED_ARCHITECTURES.get(architecture)
    if model is None:
        raise ValueError(
            f"{request.source}: early exit does not support the architecture {architecture!r} of "
            f"model {model_config.model!r}. Supported: "
            f"{', '.join(sorted(SUPPORTED_ARCHITECTURES))}. Drop it, or use a supported model."
        )
    if request.named_architecture not in (None, model.architecture):
        raise ValueError(
            f"hf_overrides: architectures=[{request.named_architecture!r}] is not the LayerSkip "
            f"class of {architecture!r}, the architecture of model {model_config.model!r}; that is "
            f"{model.architecture!r}. Correct it, or give {KEY} alone."
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
    """What ``config.json`` says layer by layer (``layer_types``, ...), for the first E layers.

    A list counts as such if its name speaks of layers and it has one value a layer.
    """
    values: dict[str, Any] = {
        key: value[:exit_layer]
        for key, value in hf_config.items()
        if "layer" in key and isinstance(value, list | tuple) and len(value) == num_layers
    }
    # Qwen2: layers from this one on have a sliding window, if any has.
    if isinstance(first := hf_config.get("max_window_layers"), int):
        values["max_window_layers"] = min(first, exit_layer)
    return values
