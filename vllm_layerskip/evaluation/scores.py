# SPDX-License-Identifier: Apache-2.0
"""Scores of every exit on given text: perplexity, accuracy, agreement with the last layer.

Shapes: B samples, T tokens, N tokens that count, H hidden, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vllm_layerskip.evaluation.exits import (
    exit_logits,
    exit_logits_by_chunk,
    observe_exit_states,
    record_exit_states,
)


@dataclass(frozen=True)
class ExitScore:
    """Next-token scores of the exit after ``exit_layer`` layers."""

    exit_layer: int
    accuracy: float
    """Share of tokens that are the exit's argmax."""
    perplexity: float
    """exp of the mean negative log likelihood of a token (natural logarithm)."""
    agreement: float
    """Share of tokens at which the exit's argmax is the last layer's; of a twin: of the model's."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Target:
    """What the last layer said of each batch; a later pass, of a twin, is compared with it."""

    def __init__(self) -> None:
        self._argmaxes: list[torch.Tensor] = []

    def of_batch(self, index: int, last: torch.Tensor) -> torch.Tensor:
        """``[N]`` argmaxes of batch ``index``: those of the first pass, ``last`` if this is it."""
        if index == len(self._argmaxes):
            self._argmaxes.append(last.cpu())
        return self._argmaxes[index].to(last.device)


@torch.inference_mode()
def score_exits(
    model: nn.Module,
    windows: torch.Tensor,
    batch_size: int = 16,
    *,
    scored: torch.Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    target: Target | None = None,
) -> list[ExitScore]:
    """Scores of every exit, from one pass of the model over the text.

    In memory are one exit state of a batch, ``B * T * H`` values, and a chunk of one exit's
    logits.

    Args:
        windows: ``[B, T]`` token ids.
        batch_size: windows in a forward pass.
        scored: ``[B, T]`` booleans, the tokens that count; default: all. The first of a window
            never does, as nothing precedes it.
        progress: called with the number of windows of each batch when it is done.
        target: what agreement is with; one that has seen a pass over the same windows and batches
            keeps that pass's last layer. Default: this pass's.

    Raises:
        ValueError: no token counts.
    """
    totals = [_Totals() for _ in range(model.config.num_hidden_layers)]
    target = target or Target()
    if scored is None:
        scored = torch.ones_like(windows, dtype=torch.bool)
    batches = zip(windows.split(batch_size), scored.split(batch_size), strict=True)
    for index, (batch, counts) in enumerate(batches):
        argmaxes = _add_batch(model, batch.to(model.device), counts.to(model.device), totals)
        said = target.of_batch(index, argmaxes[-1])
        for total, argmax in zip(totals, argmaxes, strict=True):
            total.num_agreeing += int((argmax == said).sum())
        if progress is not None:
            progress(len(batch))
    if totals[-1].num_tokens == 0:
        raise ValueError(
            "No token to score: every window needs two tokens, and one that counts after the "
            "first. Give more text."
        )
    return [total.score(layer + 1) for layer, total in enumerate(totals)]


def _add_batch(
    model: nn.Module, token_ids: torch.Tensor, scored: torch.Tensor, totals: list[_Totals]
) -> list[torch.Tensor]:
    """Run the model over ``token_ids [B, T]`` and add each exit's predictions to its totals.

    Returns:
        Each exit's argmaxes ``[N]``.
    """
    counted = scored[:, 1:]
    labels = token_ids[:, 1:][counted]  # [N]
    argmaxes: list[torch.Tensor] = []

    def observe(layer: int, state: torch.Tensor) -> None:
        argmaxes.append(totals[layer].add(model, state[:, :-1][counted], labels))

    with observe_exit_states(model, observe):
        model.model(input_ids=token_ids, use_cache=False)
    return argmaxes


@dataclass
class _Totals:
    """Sums over the tokens that one exit has predicted."""

    num_tokens: int = 0
    num_correct: int = 0
    num_agreeing: int = 0
    nll: float = 0.0

    def add(self, model: nn.Module, state: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Add tokens ``labels [N]``, predicted from ``state [N, H]``; returns argmaxes ``[N]``."""
        argmaxes = []
        num_seen = 0
        for logits in map(torch.Tensor.float, exit_logits_by_chunk(model, state)):
            targets = labels[num_seen : num_seen + len(logits)]
            argmaxes.append(logits.argmax(-1))
            self.nll += float(F.cross_entropy(logits, targets, reduction="sum"))
            num_seen += len(logits)
        argmax = torch.cat(argmaxes)
        self.num_tokens += num_seen
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
