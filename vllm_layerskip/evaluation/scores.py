# SPDX-License-Identifier: Apache-2.0
"""Scores of a LayerSkip checkpoint without an engine: what each exit knows.

Drafts that count are those behind an accepted prefix, and an accepted prefix is the
target's own text. So one forward pass over the target's greedy continuation tells every
draft decision of every exit layer: no draft loop, no cache, and a reference for the
engine that shares no code with it.

Shapes: B samples, T tokens, N continuation tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from vllm_layerskip.evaluation.exits import exit_logits, record_exit_states

_LOGITS_AT_ONCE = 1 << 25
"""Positions go through the head in chunks of about this many logits (float32: 128 MiB)."""


@dataclass(frozen=True)
class ExitScore:
    """Next-token scores of the exit after ``exit_layer`` layers."""

    exit_layer: int
    accuracy: float
    """Share of tokens that are the exit's argmax."""
    perplexity: float
    """exp of the mean negative log likelihood of a token (natural logarithm)."""
    agreement: float
    """Share of tokens at which the exit's argmax is the last layer's."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.inference_mode()
def score_exits(
    model: nn.Module,
    windows: torch.Tensor,
    batch_size: int = 16,
    *,
    scored: torch.Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[ExitScore]:
    """Scores of every exit, from one pass of the model over the text.

    Beside the exit states of one batch, ``L * B * T * H`` values, there are never more than a
    chunk of one exit's logits in memory.

    Args:
        windows: ``[B, T]`` token ids.
        batch_size: windows in a forward pass.
        scored: ``[B, T]`` booleans, the tokens that count; default: all. The first of a window
            never does, as nothing precedes it.
        progress: called with the number of windows of each batch when it is done.

    Raises:
        ValueError: no token counts.
    """
    num_layers = model.config.num_hidden_layers
    totals = [_Totals() for _ in range(num_layers)]
    if scored is None:
        scored = torch.ones_like(windows, dtype=torch.bool)
    for batch, counted in zip(
        windows.split(batch_size), scored[:, 1:].split(batch_size), strict=True
    ):
        ids, counted = batch.to(model.device), counted.to(model.device)
        labels = ids[:, 1:][counted]  # [N]
        with record_exit_states(model) as states:
            model.model(input_ids=ids, use_cache=False)
        last_argmax: torch.Tensor | None = None
        for layer in reversed(range(num_layers)):
            argmax = totals[layer].add(model, states[layer][:, :-1][counted], labels)
            if last_argmax is None:
                last_argmax = argmax
            totals[layer].num_agreeing += int((argmax == last_argmax).sum())
        if progress is not None:
            progress(len(batch))
    if totals[-1].num_tokens == 0:
        raise ValueError(
            "No token to score: every window needs two tokens, and one that counts behind the "
            "first. Give more text."
        )
    return [total.score(layer + 1) for layer, total in enumerate(totals)]


@dataclass
class _Totals:
    """Sums over the tokens that one exit has predicted."""

    num_tokens: int = 0
    num_correct: int = 0
    num_agreeing: int = 0
    nll: float = 0.0

    def add(self, model: nn.Module, state: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Add tokens ``labels [N]``, predicted from ``state [N, H]``; returns argmaxes ``[N]``."""
        chunk = max(_LOGITS_AT_ONCE // model.config.vocab_size, 1)
        argmaxes = []
        for rows, targets in zip(state.split(chunk), labels.split(chunk), strict=True):
            logits = exit_logits(model, rows).float()
            argmaxes.append(logits.argmax(-1))
            self.nll += float(F.cross_entropy(logits, targets, reduction="sum"))
        argmax = torch.cat(argmaxes)
        self.num_tokens += labels.numel()
        self.num_correct += int((argmax == labels).sum())
        return argmax

    def score(self, exit_layer: int) -> ExitScore:
        return ExitScore(
            exit_layer=exit_layer,
            accuracy=self.num_correct / self.num_tokens,
            perplexity=_exp(self.nll / self.num_tokens),
            agreement=self.num_agreeing / self.num_tokens,
        )


def _exp(value: float) -> float:
    """``math.exp``, infinite where it would overflow."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@torch.inference_mode()
def last_exit_difference(model: nn.Module, token_ids: torch.Tensor) -> float:
    """How far the last exit's logits are from the model's own, relative to the largest.

    Args:
        token_ids: ``[B, T]``.
    """
    with record_exit_states(model) as states:
        own = model(input_ids=token_ids, use_cache=False).logits.float()
    exit_ = exit_logits(model, states[-1]).float()
    return float((exit_ - own).abs().max() / own.abs().max())


@torch.inference_mode()
def greedy_draft_matches(
    model: nn.Module, prompts: torch.Tensor, num_new_tokens: int
) -> torch.Tensor:
    """Where each exit would draft the token that the target says.

    Args:
        prompts: ``[B, T]`` token ids, all of one length.

    Returns:
        ``[L - 1, B, N]`` booleans: exit ``E = i + 1`` against the greedy continuation
        (which does not stop at the end-of-sequence token).
    """
    prompts = prompts.to(model.device)
    # A token that no model says ends it: in place of None transformers puts the model's own, and
    # `min_new_tokens` would bar that one from being chosen.
    generation = GenerationConfig(
        max_new_tokens=num_new_tokens,
        do_sample=False,
        eos_token_id=[model.config.vocab_size],
        pad_token_id=0,
    )
    sequences = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=generation
    )
    with record_exit_states(model) as states:
        model.model(input_ids=sequences[:, :-1], use_cache=False)
    first = prompts.shape[1] - 1
    target = sequences[:, first + 1 :]
    return torch.stack(
        [exit_logits(model, state[:, first:]).argmax(-1) == target for state in states[:-1]]
    )


def acceptance_length(matches: torch.Tensor, num_speculative_tokens: int) -> float:
    """Mean tokens per verification (1 + accepted / drafts) over rows ``[B, N]`` of matches.

    The first continuation token comes from the prefill, so walking starts after it.

    Raises:
        ValueError: the rows are too short for one whole step.
    """
    if matches.shape[1] <= num_speculative_tokens + 1:
        raise ValueError(
            f"{matches.shape[1]} continuation tokens are too few for one step of "
            f"{num_speculative_tokens} drafts. Continue the prompts for longer."
        )
    num_steps = num_tokens = 0
    for row in matches.tolist():
        for num_accepted in accepted_runs(row[1:], num_speculative_tokens):
            num_steps += 1
            num_tokens += num_accepted + 1
    return num_tokens / num_steps


def accepted_runs(row: Sequence[bool], num_speculative_tokens: int) -> list[int]:
    """Accepted drafts of each whole verification step along one continuation."""
    runs, position = [], 0
    while position + num_speculative_tokens < len(row):
        window = row[position : position + num_speculative_tokens]
        num_accepted = next((i for i, match in enumerate(window) if not match), len(window))
        runs.append(num_accepted)
        position += num_accepted + 1
    return runs
