# SPDX-License-Identifier: Apache-2.0
"""What a decoding step costs, from a few measured steps or from a stated roofline.

A step of LayerSkip with B requests runs K draft passes of E layers and an exit head with one
token a request, and one verification: E layers with one token (the last draft's), L - E layers
with K + 1 tokens. With a layer's time linear in its tokens, that sums up to

    step(E, K) = verify + K * (draft + E * layer)

where ``verify`` is a step's constant part, its own overhead included; ``draft`` is what a draft
pass costs besides its layers (the exit head, launches, host time) and what one more verified
token costs; ``layer`` is what drafting with one more layer costs, less that layer's share of the
verified token, which reuse of exit states saves. The three numbers come from measured steps of
a few (E, K), by least squares of the relative error, for each batch size by itself: overheads
are in them as they are. Plain decoding is measured as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_layerskip.measuring.roofline import Decoding, Roofline


class Costs(Protocol):
    """Seconds of a step of ``batch_size`` requests."""

    def step_s(self, exit_layer: int, num_speculative_tokens: int, batch_size: int) -> float: ...

    def plain_s(self, batch_size: int) -> float: ...


@dataclass(frozen=True)
class MeasuredStep:
    """A step's mean time in an engine with this E and K."""

    exit_layer: int
    num_speculative_tokens: int
    batch_size: int
    seconds: float


@dataclass(frozen=True)
class StepCosts:
    """The parts of a step at one batch size, in seconds; what they are says the module."""

    plain_s: float
    verify_s: float
    draft_s: float
    layer_s: float
    worst_error: float
    """Largest relative error of the fit at a measured step."""

    def step_s(self, exit_layer: int, num_speculative_tokens: int) -> float:
        draft_pass_s = self.draft_s + exit_layer * self.layer_s
        return self.verify_s + num_speculative_tokens * draft_pass_s


@dataclass(frozen=True)
class FittedCosts:
    """Costs by measured steps."""

    by_batch_size: Mapping[int, StepCosts]

    def step_s(self, exit_layer: int, num_speculative_tokens: int, batch_size: int) -> float:
        return self.by_batch_size[batch_size].step_s(exit_layer, num_speculative_tokens)

    def plain_s(self, batch_size: int) -> float:
        return self.by_batch_size[batch_size].plain_s


@dataclass(frozen=True)
class RooflineCosts:
    """Costs by a roofline: a bound, without any overhead."""

    roofline: Roofline
    context: float
    """Tokens a request has in its KV cache."""
    num_draft_vocab_ids: int | None = None

    def step_s(self, exit_layer: int, num_speculative_tokens: int, batch_size: int) -> float:
        decoding = Decoding(
            "layerskip", exit_layer, num_speculative_tokens, draft_vocab=self.num_draft_vocab_ids
        )
        return self.roofline.step_s(decoding, batch_size, self.context)

    def plain_s(self, batch_size: int) -> float:
        return self.roofline.step_s(Decoding("plain"), batch_size, self.context)


def fit_costs(steps: Iterable[MeasuredStep], plain_s: Mapping[int, float]) -> FittedCosts:
    """Costs for each batch size of ``plain_s``, the measured seconds of a plain step.

    Raises:
        ValueError: a batch size has no measured step of LayerSkip.
    """
    steps = list(steps)
    return FittedCosts(
        {
            batch_size: _fit([step for step in steps if step.batch_size == batch_size], seconds)
            for batch_size, seconds in plain_s.items()
        }
    )


def _fit(steps: Sequence[MeasuredStep], plain_s: float) -> StepCosts:
    if not steps:
        raise ValueError("There is no measured step to fit costs to.")
    drafts = np.array([step.num_speculative_tokens for step in steps], dtype=float)
    layers = drafts * np.array([step.exit_layer for step in steps], dtype=float)
    seconds = np.array([step.seconds for step in steps])
    # Divided by the time, so that each step's relative error counts alike.
    features = np.stack([np.ones_like(drafts), drafts, layers], axis=1) / seconds[:, None]
    solution = _non_negative_least_squares(features)
    error = np.abs(features @ solution - 1).max()
    verify_s, draft_s, layer_s = (float(value) for value in solution)
    return StepCosts(plain_s, verify_s, draft_s, layer_s, float(error))


def _non_negative_least_squares(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``x >= 0`` with the least ``|features @ x - 1|``: no part of a step takes negative time.

    With three unknowns, each subset of them is tried.
    """
    num_steps, num_unknowns = features.shape
    target = np.ones(num_steps)
    best, best_error = np.zeros(num_unknowns), np.inf
    for size in range(num_unknowns, 0, -1):
        for subset in itertools.combinations(range(num_unknowns), size):
            columns = list(subset)
            # Columns differ by orders of magnitude; scaling keeps the rank's threshold fair.
            scale = np.linalg.norm(features[:, columns], axis=0)
            values = np.linalg.lstsq(features[:, columns] / scale, target, rcond=None)[0] / scale
            error = float(np.square(features[:, columns] @ values - 1).sum())
            if (values >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(num_unknowns), error
                best[columns] = values
    return best


def design_cells(
    exit_layers: Sequence[int], num_speculative_tokens: Sequence[int]
) -> list[tuple[int, int]]:
    """The (E, K) to measure for a fit: the corners of the range, and one in the middle, whose
    error tells whether a step is as linear as the fit takes it to be."""
    es, ks = sorted(exit_layers), sorted(num_speculative_tokens)
    corners = itertools.product(dict.fromkeys((es[0], es[-1])), dict.fromkeys((ks[0], ks[-1])))
    return list(dict.fromkeys([*corners, (es[len(es) // 2], ks[len(ks) // 2])]))
