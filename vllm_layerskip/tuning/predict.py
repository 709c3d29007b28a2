# SPDX-License-Identifier: Apache-2.0
"""Predicted speed of every (E, K), from its acceptance length and what its step costs.

tokens/s = B * acceptance length(E, K) / step(E, K, B)
speed-up = acceptance length(E, K) * plain step(B) / step(E, K, B)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning.costs import Costs
from vllm_layerskip.tuning.grid import Cell


@dataclass(frozen=True)
class Prediction:
    """One (E, K) at one batch size."""

    exit_layer: int
    num_speculative_tokens: int
    batch_size: int
    acceptance_length: float
    step_s: float
    speedup: float

    @property
    def cell(self) -> Cell:
        return self.exit_layer, self.num_speculative_tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all requests together."""
        return self.batch_size * self.acceptance_length / self.step_s


def predict(
    agreement: Agreement,
    costs: Costs,
    num_speculative_tokens: Sequence[int],
    batch_sizes: Sequence[int],
) -> list[Prediction]:
    """Predictions for every exit layer of ``agreement``, every K and every batch size.

    A K is left out where no answer is long enough for one step of it.
    """
    lengths = agreement.acceptance_lengths(max(num_speculative_tokens))  # [X, K]
    return [
        _prediction(exit_layer, num_drafts, batch_size, float(row[num_drafts - 1]), costs)
        for exit_layer, row in zip(agreement.exit_layers, lengths, strict=True)
        for num_drafts in num_speculative_tokens
        if not math.isnan(row[num_drafts - 1])
        for batch_size in batch_sizes
    ]


def _prediction(
    exit_layer: int, num_drafts: int, batch_size: int, acceptance_length: float, costs: Costs
) -> Prediction:
    step_s = costs.step_s(exit_layer, num_drafts, batch_size)
    speedup = acceptance_length * costs.plain_s(batch_size) / step_s
    return Prediction(exit_layer, num_drafts, batch_size, acceptance_length, step_s, speedup)
