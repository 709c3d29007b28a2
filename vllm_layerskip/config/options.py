# SPDX-License-Identifier: Apache-2.0
"""Resolves and checks a request (``request.py``) against a checkpoint's ``config.json``.

Pure functions over plain values, free of vLLM. They find every mistake that shows in the request
and in ``config.json``, before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vllm_layerskip.config.request import OWN_KEYS, named
from vllm_layerskip.twins.kinds import CHOICES, KINDS, NONE

AUTO = "auto"
ALL = "all"
"""For ``exit_layer``: every layer drafts, as a twin."""

SCHEDULE = "num_speculative_tokens_per_batch_size"
"""vLLM's key for K by batch size: ``[first batch size, last batch size, K]``, ascending."""

VLLM_KEYS = frozenset(
    {
        "draft_sample_method",
        SCHEDULE,
        "rejection_sample_method",
        "synthetic_acceptance_length",
        "synthetic_acceptance_rates",
        "use_local_argmax_reduction",
    }
)
"""vLLM's own keys that keep their meaning; they are passed through to its config."""

VALID_KEYS = frozenset({"method", "model", "num_speculative_tokens"}) | OWN_KEYS | VLLM_KEYS

CONFIG_BLOCK = "layerskip"
"""Name of the block in a checkpoint's ``config.json`` that ``"auto"`` reads."""

_REQUEST = "speculative_config"
_BLOCK = f"config.json, '{CONFIG_BLOCK}' block"
_MAY_BE_AUTO = frozenset(
    {"draft_adapter", "draft_quantization", "draft_vocab", "exit_layer", "num_speculative_tokens"}
)

_WITHOUT_TRAINING = (
    "A model that was not trained for early exit drafts with all its layers in fewer bits: set "
    "exit_layer='all', draft_quantization='int4' and num_speculative_tokens=4 (--exit-layer all "
    "--draft-quantization int4 --num-speculative-tokens 4). "
)
_SET_BLOCK = (
    'or add {"layerskip": {"exit_layer": E, "num_speculative_tokens": K}} to the '
    "checkpoint's config.json (with `vllm serve`: "
    '--hf-overrides \'{"layerskip": {"exit_layer": E, "num_speculative_tokens": K}}\').'
)


@dataclass(frozen=True)
class OptionPath:
    """A file or folder that an option names."""

    path: str
    in_checkpoint: bool
    """Whether ``path`` is relative to the checkpoint's folder or to the working directory."""
    option: str = "draft_vocab"

    @property
    def source(self) -> str:
        """The option that named it, for messages."""
        where = _BLOCK if self.in_checkpoint else _REQUEST
        return f"{where}: {self.option}={self.path!r}"


@dataclass(frozen=True)
class LayerSkipOptions:
    """A checked request.

    ``exit_layer`` E is the number of layers that draft, ``1 <= E < L``, or L with
    ``draft_quantization``; ``num_speculative_tokens`` K is the number of drafted tokens a step,
    ``K >= 1``.
    """

    exit_layer: int
    num_speculative_tokens: int
    reuse_exit_states: bool
    draft_vocab: OptionPath | None
    """None: drafts come from the whole vocabulary."""
    draft_quantization: str
    """What the weights of the layers that draft are rounded to: one of ``twins.kinds.CHOICES``."""
    draft_adapter: OptionPath | None
    """The folder of a LoRA adapter for the layers that draft."""
    vllm_options: Mapping[str, Any]
    from_checkpoint: tuple[str, ...] = ()
    """Which of ``exit_layer`` and ``num_speculative_tokens`` the checkpoint's block decided."""

    @property
    def has_twin(self) -> bool:
        """Whether drafts have weights of their own."""
        return self.draft_quantization != NONE or self.draft_adapter is not None


def resolve_options(
    request: Mapping[str, Any], num_layers: int, config_block: object
) -> LayerSkipOptions:
    """Check a request against a model of ``num_layers`` layers.

    Args:
        request: ``speculative_config`` as the user wrote it.
        num_layers: L of the target.
        config_block: the checkpoint's ``"layerskip"`` block, None if it has none.

    Raises:
        ValueError: an option is unknown, out of range or cannot be resolved; the message
            names it, its value, the valid set and what to do.
    """
    unknown = sorted(request.keys() - VALID_KEYS)
    if unknown:
        raise ValueError(
            f"speculative_config: {named(request, unknown)} cannot be used with LayerSkip. "
            f"Valid keys are {', '.join(sorted(VALID_KEYS))}. Remove the others."
        )
    request, block = _without_auto(request), _checked_block(config_block)
    quantization, source = _resolve_draft_quantization(request, block)
    draft_adapter = _resolve_path("draft_adapter", "the folder of a LoRA adapter", request, block)
    if draft_adapter is not None:
        source = draft_adapter.source
    return LayerSkipOptions(
        exit_layer=_resolve_exit_layer(request, num_layers, block, quantization),
        num_speculative_tokens=_resolve_num_speculative_tokens(request, block),
        reuse_exit_states=_resolve_reuse(request, source),
        draft_vocab=_resolve_path("draft_vocab", "the path of a file of token ids", request, block),
        draft_quantization=quantization,
        draft_adapter=draft_adapter,
        vllm_options={key: request[key] for key in sorted(VLLM_KEYS & request.keys())}
        | _schedule_of_checkpoint(request, block),
        from_checkpoint=tuple(
            key for key in ("exit_layer", "num_speculative_tokens") if key not in request
        ),
    )


def _without_auto(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request without ``"auto"`` and null values, which leave a key to the checkpoint."""
    return {
        key: value
        for key, value in request.items()
        if key not in _MAY_BE_AUTO or not (value is None or value == AUTO)
    }


def _checked_block(block: object) -> Mapping[str, Any]:
    if block is None:
        return {}
    if not isinstance(block, Mapping):
        raise ValueError(
            f"config.json: '{CONFIG_BLOCK}' must be an object with exit_layer and "
            f"num_speculative_tokens, got {block!r}. Correct the checkpoint's config.json."
        )
    return block


def _resolve_draft_quantization(
    request: Mapping[str, Any], block: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The kind of numbers, and the option that asks for a twin; None if none does."""
    key = "draft_quantization"
    where = _REQUEST if key in request else _BLOCK
    value = request.get(key, block.get(key))
    if value is None or value == NONE:
        return NONE, None
    if value not in CHOICES:
        or_auto = f", or {AUTO!r} for the checkpoint's" if key in request else ""
        raise ValueError(
            f"{where}: {key}={value!r} must be one of {', '.join(map(repr, CHOICES))}{or_auto}. "
            f"Correct it, or leave it out (--draft-quantization {NONE})."
        )
    return value, f"{where}: {key}={value!r}"


def _resolve_reuse(request: Mapping[str, Any], twin_source: str | None) -> bool:
    """Whether exit states may be reused; with a twin they may not."""
    reuse = request.get("reuse_exit_states", True)
    if not isinstance(reuse, bool):
        raise ValueError(f"speculative_config: reuse_exit_states={reuse!r} must be true or false.")
    if twin_source is None:
        return reuse
    if reuse and "reuse_exit_states" in request:
        raise ValueError(
            f"reuse_exit_states=True cannot go with {twin_source}: drafts then "
            "have weights of their own, so their exit states are not the target's, and "
            "verification must run every layer. Leave reuse_exit_states out."
        )
    return False


def _resolve_exit_layer(
    request: Mapping[str, Any], num_layers: int, block: Mapping[str, Any], quantization: str
) -> int:
    may_be_all = quantization != NONE
    if num_layers < 2:
        raise ValueError(
            "LayerSkip drafts with a model's first layers and verifies with the rest; exit_layer="
            f"{request.get('exit_layer', AUTO)!r} has no valid value for a model of {num_layers} "
            "layer(s). Use another speculative method."
        )
    largest = num_layers if may_be_all else num_layers - 1
    valid = f"an integer from 1 to {largest} (the model has {num_layers} layers)"
    if may_be_all:
        valid += f", {ALL!r} for every layer"
    if "exit_layer" in request:
        value, source, valid = request["exit_layer"], _REQUEST, f"{valid} or 'auto'"
    elif "exit_layer" in block:
        value, source = block["exit_layer"], _BLOCK
    else:
        raise ValueError(
            "speculative_config: exit_layer='auto' needs the checkpoint to name its exit "
            f"layer, and its config.json has no '{CONFIG_BLOCK}' block with exit_layer. "
            + _WITHOUT_TRAINING
            + f"Or set exit_layer (--exit-layer) to {valid}, "
            + _SET_BLOCK
        )
    if value in (ALL, num_layers) and not may_be_all:
        raise ValueError(
            f"{source}: exit_layer={value!r} must be {valid}. All layers can draft only with other "
            "weights: set exit_layer to a smaller number, or draft_quantization "
            f"(--draft-quantization) to one of {', '.join(map(repr, KINDS))}."
        )
    if value == ALL:
        return num_layers
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ValueError(f"{source}: exit_layer={value!r} must be {valid}.")
    return value


def _resolve_num_speculative_tokens(request: Mapping[str, Any], block: Mapping[str, Any]) -> int:
    if "num_speculative_tokens" in request:
        value, source = request["num_speculative_tokens"], _REQUEST
    elif "num_speculative_tokens" in block:
        value, source = block["num_speculative_tokens"], _BLOCK
    else:
        raise ValueError(
            "speculative_config: num_speculative_tokens is not set, and the checkpoint's "
            f"config.json has no '{CONFIG_BLOCK}' block with it. Set "
            "num_speculative_tokens (--num-speculative-tokens) to an integer of at least 1, "
            + _SET_BLOCK
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{source}: num_speculative_tokens={value!r} must be an integer of at least 1."
        )
    return value


def _schedule_of_checkpoint(
    request: Mapping[str, Any], block: Mapping[str, Any]
) -> dict[str, list[tuple[int, int, int]]]:
    """The checkpoint's schedule of K by batch size, where it applies.

    It was found for the checkpoint's own E and K. Setting E, K or a schedule (null for none)
    overrides it.
    """
    if SCHEDULE not in block or request.keys() & {
        "exit_layer",
        "num_speculative_tokens",
        SCHEDULE,
    }:
        return {}
    return {SCHEDULE: checked_schedule(block[SCHEDULE], _BLOCK)}


def checked_schedule(value: object, source: str) -> list[tuple[int, int, int]]:
    """A schedule of K by batch size, as vLLM takes it.

    Raises:
        ValueError: vLLM would refuse it; the message names ``source``.
    """
    valid = (
        f"{source}: {SCHEDULE}={value!r} must be a list of [first batch size, last batch size, "
        "num_speculative_tokens], with whole numbers, the first batch size 1 and no overlaps. "
        "Correct it, or run `vllm-layerskip tune` again."
    )
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(valid)
    previous_end, schedule = 0, []
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ValueError(valid)
        if any(isinstance(number, bool) or not isinstance(number, int) for number in entry):
            raise ValueError(valid)
        first, last, num_speculative_tokens = entry
        begins = first == 1 if previous_end == 0 else first > previous_end
        if not begins or last < first or num_speculative_tokens < 0:
            raise ValueError(valid)
        previous_end = last
        schedule.append((first, last, num_speculative_tokens))
    return schedule


def _resolve_path(
    option: str, what: str, request: Mapping[str, Any], block: Mapping[str, Any]
) -> OptionPath | None:
    """The file or folder that ``option`` names; None for none."""
    if option not in request:
        return _path_of_checkpoint(option, block.get(option))
    value = request[option]
    if value == NONE:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(
            f"{_REQUEST}: {option}={value!r} must be {what}, "
            f"'{AUTO}' (the checkpoint's, if it names one) or '{NONE}'."
        )
    return OptionPath(os.fspath(value), in_checkpoint=False, option=option)


def _path_of_checkpoint(option: str, value: object) -> OptionPath | None:
    if value is None or value == NONE:
        return None
    if (
        not isinstance(value, str)
        or not value
        or PurePosixPath(value).is_absolute()
        or ".." in PurePosixPath(value).parts
    ):
        flag = f"--{option.replace('_', '-')}"
        raise ValueError(
            f"{_BLOCK}: {option}={value!r} must be a path inside the checkpoint's folder, relative "
            f"to it. Correct it, or set {option}='{NONE}' ({flag} {NONE})."
        )
    return OptionPath(value, in_checkpoint=True, option=option)
