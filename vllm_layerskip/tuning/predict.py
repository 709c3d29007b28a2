# SPDX-License-Identifier: Apache-2.0
"""Predicted speed of every (E, K): acceptance length times what a step saves.

tokens/s = B * acceptance length(E, K) / step(E, K, B)
speed-up = acceptance length(E, K) * plain step(B) / step(E, K, B)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning.costs import Costs


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
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.batch_size * self.acceptance_length / self.step_s


def predict(
    agreement: Agreement,
    costs: Costs,
    num_speculative_tokens: Sequence[int],
    batch_sizes: Sequence[int],
) -> list[Prediction]:
    """Every exit layer of ``agreement`` with every K and batch size.

    A K is left out where no continuation is long enough for one step of it.
    """
    lengths = agreement.acceptance_lengths(max(num_speculative_tokens))
    predictions = []
    for index, exit_layer in enumerate(agreement.exit_layers):
        for num_drafts in num_speculative_tokens:
            length = float(lengths[index, num_drafts - 1])
            if math.isnan(length):
                continue
            for batch_size in batch_sizes:
                step_s = costs.step_s(exit_layer, num_drafts, batch_size)
                speedup = length * costs.plain_s(batch_size) / step_s
                predictions.append(
                    Prediction(exit_layer, num_drafts, batch_size, length, step_s, speedup)
                )
    return predictions
