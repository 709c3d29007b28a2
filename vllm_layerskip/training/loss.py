# SPDX-License-Identifier: Apache-2.0
"""The early-exit loss ``J(t) = sum_l e~(t, l) CE(exit_l, labels)`` (paper, section 4.1.2).

The last exit is the model, and its loss is the one that the model computes itself. Earlier exits
add theirs a few tokens at a time: their logits live only while they are used, and are computed
again in the backward pass. So memory is that of plain training plus one chunk of logits, however
many exits there are.

Shapes: B samples, T tokens, V vocabulary, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_layerskip.evaluation.exits import around_layers, exit_logits
from vllm_layerskip.training.dropout import run_kept

IGNORED = -100
CHUNK_TOKENS = 1024


def exit_cross_entropy(
    model: nn.Module,
    state: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Summed cross entropy of one exit.

    Args:
        state: ``[B, T, H]``.
        targets: ``[B * T]``, the token that each position is to predict.
        positions: which of the ``B * T`` positions count.
        chunk_tokens: number of positions whose logits exist at a time.
    """
    flat = state.flatten(0, 1)

    def chunk_loss(flat: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        logits = exit_logits(model, flat[chunk]).float()
        return F.cross_entropy(logits, targets[chunk], reduction="sum")

    total = torch.zeros((), device=state.device)
    for chunk in positions.split(chunk_tokens):
        total = total + checkpoint(
            chunk_loss, flat, chunk, use_reentrant=False, preserve_rng_state=False
        )
    return total


def shifted_labels(labels: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """``[B * T]``: the token that each position is to predict, or ``IGNORED``.

    Args:
        kwargs: of the loss function; whoever cuts sequences over ranks shifts labels before.
    """
    shifted = kwargs.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    return shifted.flatten()


def counted_positions(targets: torch.Tensor) -> torch.Tensor:
    """``[N]``, which of ``targets [B * T]`` count."""
    return (targets != IGNORED).nonzero().squeeze(1)


@contextmanager
def replaced_loss(model: nn.Module, loss: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within this block ``loss`` is the ``loss_function`` of a model of transformers."""
    had_own = "_loss_function" in vars(model)
    own = model.loss_function
    model.loss_function = loss
    try:
        yield
    finally:
        if had_own:
            model.loss_function = own
        else:
            del model._loss_function


class ExitMeter:
    """Cross entropy of each exit, summed over the tokens since ``read`` was last called."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.totals = torch.zeros(2, num_layers, dtype=torch.float64, device=device)

    def add(self, layer: int, total: torch.Tensor, num_tokens: torch.Tensor) -> None:
        self.totals[0, layer] += total.detach()
        self.totals[1, layer] += num_tokens

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """``{"exit_E_loss": mean}`` of the exits that were seen; starts again from zero.

        Args:
            reduce: sums a tensor over all ranks.
        """
        totals, counts = reduce(self.totals).tolist()
        self.totals = torch.zeros_like(self.totals)
        return {
            f"exit_{layer + 1}_loss": total / count
            for layer, (total, count) in enumerate(zip(totals, counts, strict=True))
            if count
        }


class ExitLoss:
    """Runs one forward pass of a causal language model with dropout and the early-exit loss.

    It stands in for the model's ``loss_function`` and so gets labels and normalisation. The loss
    is thus computed inside the model's forward, where distributed wrappers have gathered its
    weights.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[int, float],
        meter: ExitMeter,
        kept: np.ndarray | None = None,
        always_run: bool = False,
    ) -> None:
        """What one forward pass is to compute.

        Args:
            weights: e~(t, l) of the exits to compute, by layer; the last layer is among them.
            kept: ``[L, B]``, the samples that each layer runs for; None: all.
            always_run: see ``run_kept``.
        """
        self.model = model
        self.weights = weights
        self.meter = meter
        self.kept = kept
        self.always_run = always_run
        self.last = len(model.model.layers) - 1
        self.states: dict[int, torch.Tensor] = {}
        self.num_calls = 0
        self._own_loss: Callable[..., torch.Tensor] = model.loss_function

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the model's forward returns J as its loss.

        Raises:
            RuntimeError: the model was run without computing a loss by its ``loss_function``.
        """
        try:
            with (
                replaced_loss(self.model, self._loss),
                around_layers(self.model, self._around),
            ):
                yield
        finally:
            self.states.clear()
        if not self.num_calls:
            raise RuntimeError(
                f"{type(self.model).__name__} computed no loss: its batches have no labels, or an "
                "option replaces the model's loss function. Early exits were not trained."
            )

    def _around(
        self,
        layer: int,
        call: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.kept is None:
            output = call(hidden_states, **kwargs)
        else:
            output = run_kept(call, hidden_states, kwargs, self.kept[layer], self.always_run)
        if layer in self.weights and layer != self.last:
            self.states[layer] = output
        return output

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """J, called as transformers calls a model's ``loss_function``."""
        self.num_calls += 1
        own = self._own_loss(
            logits=logits,
            labels=labels,
            vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        targets = shifted_labels(labels, kwargs).to(logits.device)
        num_tokens = (targets != IGNORED).sum()
        normaliser = num_tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        self.meter.add(self.last, own * normaliser, num_tokens)
        if not self.states:
            return own
        positions = counted_positions(targets)
        loss = self.weights[self.last] * own
        for layer, state in self.states.items():
            total = exit_cross_entropy(self.model, state, targets, positions)
            self.meter.add(layer, total, num_tokens)
            loss = loss + self.weights[layer] * (total / normaliser)
        return loss


def positive(weights: Sequence[float]) -> dict[int, float]:
    """Weights by layer: of the exits that have one, and of the last."""
    last = len(weights) - 1
    return {layer: w for layer, w in enumerate(weights) if w > 0 or layer == last}
