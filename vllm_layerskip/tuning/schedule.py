# SPDX-License-Identifier: Apache-2.0
"""Choose one draft, one exit layer, and K by batch size, by speed-ups.

An engine has one draft and one E and lets K fall as its batch grows, down to 0, which is plain
decoding. So the choice is the draft and the E with the best mean speed-up if each batch size has
its best K, or 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_layerskip.config.options import SCHEDULE
from vllm_layerskip.tuning.drafts import OWN, Draft
from vllm_layerskip.tuning.grid import DraftCell
from vllm_layerskip.twins.kinds import NONE

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
    draft: Draft = OWN

    @property
    def pays(self) -> bool:
        """Whether there is a batch size at which drafting is faster than plain decoding."""
        return any(num_drafts for _, _, num_drafts in self.schedule)

    def to_dict(self) -> dict[str, Any]:
        """E, K, the schedule and the kind of a twin, by their names in config.json."""
        quantization = self.draft.quantization
        return {
            "exit_layer": self.exit_layer,
            "num_speculative_tokens": self.num_speculative_tokens,
            SCHEDULE: [list(entry) for entry in self.schedule],
            **({} if quantization == NONE else {"draft_quantization": quantization}),
        }


def choose_draft(speedups: Mapping[Draft, Speedups]) -> Choice:
    """The draft whose exit layer has the largest mean speed-up. Of equals the first one wins.

    Raises:
        ValueError: there are no speed-ups.
    """
    draft = max(speedups, key=lambda draft: max(_scores(speedups[draft]).values()))
    return replace(choose(speedups[draft]), draft=draft)


def choose(speedups: Speedups) -> Choice:
    """The exit layer with the largest mean speed-up (geometric, over the batch sizes), and its K.

    If drafting pays nowhere, the schedule has 0 drafts, and E and K are those that lose the least,
    for a user who drafts all the same. Of equals the smaller E and K win.

    Raises:
        ValueError: there are no speed-ups.
    """
    if not speedups:
        raise ValueError("There is nothing to choose from.")
    batch_sizes, scores = _batch_sizes(speedups), _scores(speedups)
    exit_layer = max(scores, key=lambda layer: scores[layer])
    best = {size: _best(speedups, exit_layer, size) for size in batch_sizes}
    drafts = {size: num_drafts if value > 1 else 0 for size, (num_drafts, value) in best.items()}
    largest = max(drafts.values())
    return Choice(
        exit_layer=exit_layer,
        num_speculative_tokens=largest or best[batch_sizes[0]][0],
        schedule=make_schedule(drafts),
        speedups={size: max(value, 1.0) for size, (_, value) in best.items()},
    )


def _batch_sizes(speedups: Speedups) -> list[int]:
    return sorted({batch_size for _, _, batch_size in speedups})


def _scores(speedups: Speedups) -> dict[int, tuple[float, float]]:
    """Each exit layer's mean speed-up, without and with losses, the smallest layer first."""
    scores = {}
    for exit_layer in sorted({exit_layer for exit_layer, _, _ in speedups}):
        best = [_best(speedups, exit_layer, size)[1] for size in _batch_sizes(speedups)]
        scores[exit_layer] = _log_mean([max(value, 1.0) for value in best]), _log_mean(best)
    return scores


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


def candidates(speedups: Mapping[Draft, Speedups]) -> list[DraftCell]:
    """All cells in the order in which they are worth measuring.

    The chosen draft's E with its Ks comes first, then the best cell of each other draft, since
    drafts are predicted with errors of their own; then what is closest to the best of any batch
    size.
    """
    chosen = choose_draft(speedups).draft
    wanted = _wanted(chosen, speedups[chosen])
    for draft, of_draft in speedups.items():
        wanted += _wanted(draft, of_draft)[:1]
    closeness = _closeness(speedups)
    # Sorting is stable: of equals the smaller E and K of the first draft.
    ranked = sorted(closeness, key=lambda found: -closeness[found])
    return list(dict.fromkeys([*wanted, *ranked]))


def _wanted(draft: Draft, speedups: Speedups) -> list[DraftCell]:
    """What a draft's choice needs: its best exit layer with the best K of each batch size."""
    exit_layer = choose(speedups).exit_layer
    return [
        DraftCell(draft, (exit_layer, _best(speedups, exit_layer, size)[0]))
        for size in _batch_sizes(speedups)
    ]


def _closeness(speedups: Mapping[Draft, Speedups]) -> dict[DraftCell, float]:
    """Each cell's share of the best speed-up, at the batch size where it is largest."""
    best: dict[int, float] = {}
    for of_draft in speedups.values():
        for (_, _, size), speedup in of_draft.items():
            best[size] = max(best.get(size, 0.0), speedup)
    closeness: dict[DraftCell, float] = {}
    for draft, of_draft in speedups.items():
        for (exit_layer, num_drafts, size), speedup in sorted(of_draft.items()):
            found = DraftCell(draft, (exit_layer, num_drafts))
            closeness[found] = max(closeness.get(found, 0.0), speedup / best[size])
    return closeness
