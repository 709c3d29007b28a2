# SPDX-License-Identifier: Apache-2.0
"""Settings of the measured engines, from what the user asked for and the checkpoint's config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_layerskip.config.draft_vocab import read_draft_vocab
from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.shapes import Shape
from vllm_layerskip.tuning.grid import Grid
from vllm_layerskip.tuning.jobs import EngineSettings
from vllm_layerskip.tuning.prompts import EncodedPrompts
from vllm_layerskip.tuning.settings import TuneSettings
from vllm_layerskip.twins.adapter import DraftAdapter

_LENGTH_STEP = 64
_MIN_KV_CACHE_BYTES = 64 << 20
_KV_VALUE_BYTES = 4
"""float32, the widest."""


@dataclass(frozen=True)
class Device:
    """Where engines run, and in which dtype."""

    name: str
    """``cuda`` or ``cpu``."""
    dtype: str


def engine_settings(
    settings: TuneSettings,
    config: Mapping[str, Any],
    device: Device,
    prompts: EncodedPrompts,
    grid: Grid,
    adapters: Mapping[str, DraftAdapter],
) -> EngineSettings:
    """Settings under which every cell of the grid can answer the prompts.

    Args:
        grid: of any draft; all have the same K and batch sizes.

    Raises:
        UserError: the model takes fewer tokens than that needs.
    """
    num_tokens = max_model_len(
        prompts.longest, settings.prompts.max_tokens, max(grid.num_speculative_tokens), config
    )
    on_cpu = device.name == "cpu"
    return EngineSettings(
        model=settings.model,
        dtype=device.dtype,
        device=device.name,
        max_model_len=num_tokens,
        enforce_eager=settings.engine.enforce_eager,
        draft_vocab=settings.engine.draft_vocab,
        kv_cache_memory_bytes=_kv_bytes(config, num_tokens, grid) if on_cpu else None,
        draft_adapters={
            digest: str(adapter.path.absolute()) for digest, adapter in adapters.items()
        },
        engine_args=settings.engine.engine_args,
    )


def max_model_len(
    num_prompt_tokens: int, max_tokens: int, num_drafts: int, config: Mapping[str, Any]
) -> int:
    """Tokens of the longest request with its drafts.

    Raises:
        UserError: the model takes fewer.
    """
    needed = num_prompt_tokens + max_tokens + num_drafts + 1
    longest = config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) else sys.maxsize
    if needed > longest:
        raise UserError(
            f"--max-tokens {max_tokens}: with the longest prompt and its drafts that is "
            f"{needed} tokens, and the model takes {longest}. Lower --max-tokens or "
            "--max-prompt-tokens."
        )
    # Rounded up, so that another range of K seldom changes the digest of the settings.
    return min(-(-needed // _LENGTH_STEP) * _LENGTH_STEP, longest)


def _kv_bytes(config: Mapping[str, Any], num_tokens: int, grid: Grid) -> int:
    """Room for the largest batch, and as much again for the prompts of the next one."""
    shape = Shape.from_config(config)
    num_values = num_tokens * shape.num_layers * shape.kv_values_per_layer
    return max(_MIN_KV_CACHE_BYTES, 2 * max(grid.batch_sizes) * num_values * _KV_VALUE_BYTES)


def draft_vocab_ids(
    request: str | None, model: str, config: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """Token ids that drafts may be, as an engine would read them; None for all.

    Args:
        request: ``--draft-vocab``; None leaves it to the checkpoint.

    Raises:
        UserError: the draft vocabulary cannot be read.
    """
    block = config.get("layerskip")
    name = block.get("draft_vocab") if isinstance(block, dict) else None
    asked = {"method": "layerskip", "exit_layer": 1, "num_speculative_tokens": 1}
    if request is not None:
        asked["draft_vocab"] = request
    try:
        file = resolve_options(asked, 2, {"draft_vocab": name} if name else None).draft_vocab
        if file is None:
            return None
        path = Path(model, file.path) if file.in_checkpoint else Path(file.path).expanduser()
        vocab = read_draft_vocab(path, file.source, config["vocab_size"])
    except ValueError as error:
        raise UserError(f"--draft-vocab: {error}") from None
    return tuple(int(token) for token in vocab.token_ids)
