# SPDX-License-Identifier: Apache-2.0
"""The modes that are compared: which model each one serves, and its ``speculative_config``.

=====================  ========================================================================
plain                  vLLM without speculation: the baseline
layerskip              this plugin, with or without draft quantization
layerskip-no-reuse     layerskip, but verification runs the early stage for every token
draft-model            vLLM's ``draft_model`` with the first E layers as a separate model of the
                       same weights: shows what sharing weights, KV cache and exit states is worth
ngram                  vLLM's ``ngram_gpu``, prompt lookup on Model Runner V2
early-exit             the first E layers alone: lossy, the upper bound of draft speed
transformers           transformers' ``generate``, batch 1: the baseline of transformers-assistant
transformers-assistant ``generate(assistant_early_exit=E)``, batch 1
=====================  ========================================================================
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines.presets import geometric_rates
from vllm_layerskip.errors import UserError
from vllm_layerskip.twins.kinds import NONE

VLLM_MODES = ("plain", "layerskip", "layerskip-no-reuse", "draft-model", "ngram", "early-exit")
TRANSFORMERS_MODES = ("transformers", "transformers-assistant")
MODES = VLLM_MODES + TRANSFORMERS_MODES

CUT_MODES = ("draft-model", "early-exit")
"""Modes that serve a model cut after E layers."""
SYNTHETIC_MODES = ("layerskip", "layerskip-no-reuse", "draft-model")
"""Modes whose acceptance can be set. Not ngram: where it finds no draft, none may be accepted."""


@dataclass(frozen=True)
class Speculation:
    """What to draft, and how much of it is accepted."""

    exit_layer: int
    num_speculative_tokens: int
    acceptance_length: float | None = None
    """Synthetic acceptance; None verifies for real."""
    draft_vocab: str | None = None
    """File of token ids for the drafts' LM head."""
    draft_quantization: str = NONE
    """What the weights of the layers that draft become."""
    schedule: list[list[int]] | None = None
    """``num_speculative_tokens_per_batch_size`` as vLLM takes it."""


def speculative_config(
    mode: str, speculation: Speculation, cut_model: Path | None
) -> dict[str, Any] | None:
    """``speculative_config`` of a vLLM mode, None where it has no drafts.

    Args:
        cut_model: the first E layers as a model folder, for ``draft-model``.
    """
    if mode in ("plain", "early-exit"):
        return None
    config: dict[str, Any] = {"num_speculative_tokens": speculation.num_speculative_tokens}
    if mode == "ngram":
        config |= {"method": "ngram_gpu", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    elif mode == "draft-model":
        config |= {"method": "draft_model", "model": str(cut_model)}
    else:
        config |= _layerskip(mode, speculation)
    if speculation.schedule is not None:
        config["num_speculative_tokens_per_batch_size"] = speculation.schedule
    if mode in SYNTHETIC_MODES:
        config |= _synthetic_acceptance(speculation)
    return config


def _layerskip(mode: str, speculation: Speculation) -> dict[str, Any]:
    kind = speculation.draft_quantization if mode == "layerskip" else NONE
    config: dict[str, Any] = {
        "method": "layerskip",
        "exit_layer": speculation.exit_layer,
        "draft_quantization": kind,  # Always, since a checkpoint's block may name another.
    }
    if kind == NONE:  # A twin reuses nothing.
        config["reuse_exit_states"] = mode == "layerskip"
    if speculation.draft_vocab is not None:
        config["draft_vocab"] = speculation.draft_vocab
    return config


def _synthetic_acceptance(speculation: Speculation) -> dict[str, Any]:
    length, num_drafts = speculation.acceptance_length, speculation.num_speculative_tokens
    if length is None:
        return {}
    config: dict[str, Any] = {"rejection_sample_method": "synthetic"}
    if speculation.schedule is None:
        # vLLM's least variance around the mean, so the least noise in what is measured.
        return config | {"synthetic_acceptance_length": length}
    return config | {"synthetic_acceptance_rates": geometric_rates(length, num_drafts)}


def write_draft_vocab(draft_vocab: str, vocab_size: int, folder: Path) -> str:
    """A draft vocabulary's file: a given file as it is; for a number N a file of the first N ids.

    Raises:
        UserError: N is not a size of a part of the vocabulary.
    """
    if not draft_vocab.isdecimal():
        return draft_vocab
    size = int(draft_vocab)
    if not 1 <= size <= vocab_size:
        raise UserError(
            f"--draft-vocab={draft_vocab} must be from 1 to {vocab_size}, the model's vocabulary, "
            "or a file of token ids."
        )
    path = folder / f"draft_vocab_{size}.json"
    path.write_text(json.dumps(list(range(size))), encoding="utf-8")
    return str(path)
