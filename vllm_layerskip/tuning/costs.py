# SPDX-License-Identifier: Apache-2.0
"""What a decoding step costs, from a few measured steps or from a stated roofline.

A step of LayerSkip with B requests runs K draft passes of E layers and an exit head with one
token a request, and one verification: E layers with one token (the last draft's), L - E layers
with K + 1 tokens. With a layer's time linear in its tokens, that sums up to

    step(E, K) = verify + K * (draft + E * layer)

where ``verify`` is a step's constant part, its own overhead included; ``draft`` is what a draft
pass costs besides its layers (the exit head, launches, host time) and what one more verified
token costs; ``layer`` is what drafting with one more layer costs, less that layer's share of the
verified token, which reuse of exit states saves. The three numbers come from measured steps of a
few (E, K), by least squares of the relative error, for each batch size by itself; so they contain
overheads. Plain decoding is measured as it is.

With a draft twin exit states are not reused: a verification runs all layers with K + 1 tokens, and
``layer`` is what a layer of the twin costs. Each kind of twin has a fit of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.hardware import GPUS, find_by_part
from vllm_layerskip.measuring.roofline import NUM_BYTES, Decoding, Roofline
from vllm_layerskip.measuring.shapes import Shape
from vllm_layerskip.tuning.grid import Cell
from vllm_layerskip.twins.kinds import NONE

_DAMPING = 1e-6
"""A small weight on the size of a solution, so that there is always exactly one."""


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
    """The parts of a step at one batch size, in seconds; the module docstring explains them."""

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
    draft_quantization: str = NONE
    """The kind of a draft twin."""

    def step_s(self, exit_layer: int, num_speculative_tokens: int, batch_size: int) -> float:
        decoding = Decoding(
            "layerskip",
            exit_layer,
            num_speculative_tokens,
            draft_vocab=self.num_draft_vocab_ids,
            draft_quantization=self.draft_quantization,
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

    If the measured steps cannot tell parts apart (there is only one K, say), it is the smallest
    such ``x``.
    """
    num_steps, num_unknowns = features.shape
    # Columns differ by orders of magnitude.
    scale = np.linalg.norm(features, axis=0)
    damped = np.vstack([features / scale, _DAMPING * np.eye(num_unknowns)])
    target = np.concatenate([np.ones(num_steps), np.zeros(num_unknowns)])
    return nnls(damped, target)[0] / scale


def find_roofline(hardware: str, config: Mapping[str, Any], dtype: str) -> Roofline:
    """The roofline of a checkpoint on a GPU.

    Args:
        hardware: words of the GPU's name, such as ``h100``.
        config: the checkpoint's config.json.
        dtype: of the engine; ``auto`` for the checkpoint's.

    Raises:
        UserError: the GPU or the dtype is unknown.
    """
    found = find_by_part(hardware)
    if found is None:
        raise UserError(
            f"--hardware {hardware}: no such GPU is known. Known ones are {', '.join(GPUS)}; a "
            "word of the name is enough."
        )
    if dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in NUM_BYTES:
        raise UserError(f"--dtype {dtype}: the roofline knows {', '.join(NUM_BYTES)}. Give one.")
    return Roofline(Shape.from_config(config), found[1], dtype)


def design_cells(exit_layers: Sequence[int], num_speculative_tokens: Sequence[int]) -> list[Cell]:
    """The cells to measure for a fit: the corners of the range, and one in the middle, whose
    error tells whether a step is as linear as the fit takes it to be."""
    es, ks = sorted(exit_layers), sorted(num_speculative_tokens)
    corners = itertools.product(dict.fromkeys((es[0], es[-1])), dict.fromkeys((ks[0], ks[-1])))
    return list(dict.fromkeys([*corners, (es[len(es) // 2], ks[len(ks) // 2])]))
