# SPDX-License-Identifier: Apache-2.0
"""Choose one exit layer, and K by batch size, by speed-ups.

An engine has one E and lets K fall as its batch grows, down to 0, which is plain decoding. So
the choice is the E with the best mean speed-up if each batch size has its best K, or 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.config.options import SCHEDULE
from vllm_layerskip.tuning.grid import Cell

Speedups = Mapping[tuple[int, int, int], float]
"""Speed-up over plain decoding by (E, K, batch size)."""


@dataclass(frozen=True)
class Choice:
    """What to serve with."""

    exit_layer: int
    num_speculative_tokens: int
    schedule: tuple[tuple[int, int, int], ...]
    """``(first batch size, last batch size, K)``, vLLM's ``num_speculative_tokens_per_batch_size``.
    After its end vLLM goes on with the last K."""
    speedups: Mapping[int, float]
    """By batch size; 1 where nothing is drafted."""

    @property
    def pays(self) -> bool:
        """Whether there is a batch size at which drafting is faster than plain decoding."""
        return any(num_drafts for _, _, num_drafts in self.schedule)

    def to_dict(self) -> dict[str, Any]:
        """E, K and the schedule, by their names in config.json."""
        return {
            "exit_layer": self.exit_layer,
            "num_speculative_tokens": self.num_speculative_tokens,
            SCHEDULE: [list(entry) for entry in self.schedule],
        }


def choose(speedups: Speedups) -> Choice:
    """The exit layer with the largest mean speed-up (geometric, over the batch sizes), and its K.

    If drafting pays nowhere, the schedule has 0 drafts, and E and K are those that lose the least,
    for a user who drafts all the same. Of equals the smaller E and K win.

    Raises:
        ValueError: there are no speed-ups.
    """
    if not speedups:
        raise ValueError("There is nothing to choose from.")
    batch_sizes = sorted({batch_size for _, _, batch_size in speedups})
    exit_layers = sorted({exit_layer for exit_layer, _, _ in speedups})

    def score(exit_layer: int) -> tuple[float, float]:
        best = [_best(speedups, exit_layer, size)[1] for size in batch_sizes]
        return _log_mean([max(value, 1.0) for value in best]), _log_mean(best)

    exit_layer = max(exit_layers, key=score)
    best = {size: _best(speedups, exit_layer, size) for size in batch_sizes}
    drafts = {size: num_drafts if value > 1 else 0 for size, (num_drafts, value) in best.items()}
    largest = max(drafts.values())
    return Choice(
        exit_layer=exit_layer,
        num_speculative_tokens=largest or best[batch_sizes[0]][0],
        schedule=make_schedule(drafts),
        speedups={size: max(value, 1.0) for size, (_, value) in best.items()},
    )


def _best(speedups: Speedups, exit_layer: int, batch_size: int) -> tuple[int, float]:
    """The fastest K of an exit layer, and its speed-up."""
    values = {
        k: value for (e, k, b), value in speedups.items() if (e, b) == (exit_layer, batch_size)
    }
    if not values:
        return 1, 0.0
    num_drafts = max(sorted(values), key=lambda k: values[k])
    return num_drafts, values[num_drafts]


def _log_mean(values: Sequence[float]) -> float:
    return sum(math.log(max(value, 1e-9)) for value in values) / len(values)


def make_schedule(num_drafts: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
    """The schedule for K by measured batch size.

    Batches between two of them get the larger one's K: drafting gains less in larger batches, so
    that is the careful side.
    """
    ranges: list[tuple[int, int, int]] = []
    first = 1
    for batch_size in sorted(num_drafts):
        drafts = num_drafts[batch_size]
        if ranges and ranges[-1][2] == drafts:
            ranges[-1] = (ranges[-1][0], batch_size, drafts)
        else:
            ranges.append((first, batch_size, drafts))
        first = batch_size + 1
    return tuple(ranges)


def candidates(speedups: Speedups) -> list[Cell]:
    """All cells in the order in which they are worth measuring.

    The chosen E with its Ks comes first, then what is closest to the best of any batch size.
    """
    exit_layer = choose(speedups).exit_layer
    batch_sizes = sorted({batch_size for _, _, batch_size in speedups})
    wanted = [(exit_layer, _best(speedups, exit_layer, size)[0]) for size in batch_sizes]
    closeness = _closeness(speedups)
    ranked = sorted(closeness, key=lambda cell: (-closeness[cell], cell))
    return list(dict.fromkeys([*wanted, *ranked]))


def _closeness(speedups: Speedups) -> dict[Cell, float]:
    """Each cell's share of the best speed-up, at the batch size where it is largest."""
    best: dict[int, float] = {}
    for (_, _, batch_size), speedup in speedups.items():
        best[batch_size] = max(best.get(batch_size, 0.0), speedup)
    closeness: dict[Cell, float] = {}
    for (exit_layer, num_drafts, batch_size), speedup in speedups.items():
        cell = (exit_layer, num_drafts)
        closeness[cell] = max(closeness.get(cell, 0.0), speedup / best[batch_size])
    return closeness
