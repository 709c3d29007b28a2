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

AUTO = "auto"
NONE = "none"

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
_MAY_BE_AUTO = frozenset({"draft_vocab", "exit_layer", "num_speculative_tokens"})

_SET_BLOCK = (
    'or add {"layerskip": {"exit_layer": E, "num_speculative_tokens": K}} to the '
    "checkpoint's config.json (with `vllm serve`: "
    '--hf-overrides \'{"layerskip": {"exit_layer": E, "num_speculative_tokens": K}}\').'
)


@dataclass(frozen=True)
class DraftVocabFile:
    """Where the draft vocabulary's token ids are."""

    path: str
    in_checkpoint: bool
    """Whether ``path`` is relative to the checkpoint's folder or to the working directory."""

    @property
    def source(self) -> str:
        """The option that named the file, for messages."""
        where = _BLOCK if self.in_checkpoint else _REQUEST
        return f"{where}: draft_vocab={self.path!r}"


@dataclass(frozen=True)
class LayerSkipOptions:
    """A checked request.

    ``exit_layer`` E is the number of layers that draft, ``1 <= E < L``;
    ``num_speculative_tokens`` K is the number of drafted tokens a step, ``K >= 1``.
    """

    exit_layer: int
    num_speculative_tokens: int
    reuse_exit_states: bool
    draft_vocab: DraftVocabFile | None
    """None: drafts come from the whole vocabulary."""
    vllm_options: Mapping[str, Any]
    from_checkpoint: tuple[str, ...] = ()
    """Which of ``exit_layer`` and ``num_speculative_tokens`` the checkpoint's block decided."""


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
    reuse = request.get("reuse_exit_states", True)
    if not isinstance(reuse, bool):
        raise ValueError(f"speculative_config: reuse_exit_states={reuse!r} must be true or false.")
    return LayerSkipOptions(
        exit_layer=_resolve_exit_layer(request, num_layers, block),
        num_speculative_tokens=_resolve_num_speculative_tokens(request, block),
        reuse_exit_states=reuse,
        draft_vocab=_resolve_draft_vocab(request, block),
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


def _resolve_exit_layer(
    request: Mapping[str, Any], num_layers: int, block: Mapping[str, Any]
) -> int:
    if num_layers < 2:
        raise ValueError(
            "LayerSkip drafts with a model's first layers and verifies with the rest; exit_layer="
            f"{request.get('exit_layer', AUTO)!r} has no valid value for a model of {num_layers} "
            "layer(s). Use another speculative method."
        )
    valid = f"an integer from 1 to {num_layers - 1} (the model has {num_layers} layers)"
    if "exit_layer" in request:
        value, source, valid = request["exit_layer"], _REQUEST, f"{valid} or 'auto'"
    elif "exit_layer" in block:
        value, source = block["exit_layer"], _BLOCK
    else:
        raise ValueError(
            "speculative_config: exit_layer='auto' needs the checkpoint to name its exit "
            f"layer, and its config.json has no '{CONFIG_BLOCK}' block with exit_layer. "
            f"Set exit_layer (--exit-layer) to {valid}, " + _SET_BLOCK
        )
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < num_layers:
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


def _resolve_draft_vocab(
    request: Mapping[str, Any], block: Mapping[str, Any]
) -> DraftVocabFile | None:
    if "draft_vocab" not in request:
        return _draft_vocab_of_checkpoint(block.get("draft_vocab"))
    value = request["draft_vocab"]
    if value == NONE:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(
            f"{_REQUEST}: draft_vocab={value!r} must be the path of a file of token ids, "
            f"'{AUTO}' (the checkpoint's, if it names one) or '{NONE}' (the whole vocabulary)."
        )
    return DraftVocabFile(os.fspath(value), in_checkpoint=False)


def _draft_vocab_of_checkpoint(value: object) -> DraftVocabFile | None:
    if value is None:
        return None
    if (
        not isinstance(value, str)
        or not value
        or PurePosixPath(value).is_absolute()
        or ".." in PurePosixPath(value).parts
    ):
        raise ValueError(
            f"{_BLOCK}: draft_vocab={value!r} must be the path of a "
            "file inside the checkpoint's folder, relative to it. Correct it, or set "
            f"draft_vocab='{NONE}' (--draft-vocab {NONE})."
        )
    return DraftVocabFile(value, in_checkpoint=True)
