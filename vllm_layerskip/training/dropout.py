# SPDX-License-Identifier: Apache-2.0
"""Layer dropout by sample: a dropped sample passes a layer unchanged, and costs nothing there.

Shapes: B samples, T tokens, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


def kept_samples(
    rates: Sequence[float], num_samples: int, seed: int, step: int, micro_step: int = 0
) -> np.ndarray:
    """Which layers run for which samples: ``[L, B]`` booleans.

    The random numbers follow from the arguments alone. So every rank draws the same (and drops
    the same number of samples, as in the paper), a resumed run goes on with those of an
    uninterrupted one, and no other random number generator is touched.

    Args:
        rates: p(l, t) of each layer.
        micro_step: which of the step's accumulated batches it is.
    """
    numbers = np.random.default_rng([seed, step, micro_step]).random((len(rates), num_samples))
    return numbers >= np.asarray(rates)[:, None]


def run_kept(
    layer: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    kwargs: Mapping[str, Any],
    kept: np.ndarray,
    always_run: bool = False,
) -> torch.Tensor:
    """Run a decoder layer for the kept samples; the others pass it unchanged.

    Args:
        hidden_states: ``[B, T, H]``.
        kept: ``[B]`` booleans.
        always_run: run the layer even if no sample is kept, on a sample whose output is
            discarded: distributed wrappers need every parameter to take part in each backward.
    """
    if kept.all():
        return layer(hidden_states, **kwargs)
    if kept.any():
        samples = torch.from_numpy(np.flatnonzero(kept)).to(hidden_states.device)
        output = _run_subset(layer, hidden_states, kwargs, samples)
        return hidden_states.index_copy(0, samples, output.to(hidden_states.dtype))
    if not always_run:
        return hidden_states
    samples = torch.zeros(1, dtype=torch.long, device=hidden_states.device)
    output = _run_subset(layer, hidden_states, kwargs, samples)
    # Not `0 * output`: an infinite output would become NaN.
    never = torch.zeros((), dtype=torch.bool, device=hidden_states.device)
    return torch.where(never, output.to(hidden_states.dtype), hidden_states)


def _run_subset(
    layer: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    kwargs: Mapping[str, Any],
    samples: torch.Tensor,
) -> torch.Tensor:
    """The layer's output ``[len(samples), T, H]``; on a subset of the batch where possible."""
    num_samples = hidden_states.shape[0]
    if num_samples == 1:
        return layer(hidden_states, **kwargs)
    if not all(_is_by_sample(value) for value in kwargs.values()):
        return layer(hidden_states, **kwargs)[samples]
    subset = {name: _select(value, samples, num_samples) for name, value in kwargs.items()}
    return layer(hidden_states[samples], **subset)


def _is_by_sample(value: Any) -> bool:
    """False for what cannot be cut along the batch: flex attention's BlockMask or a cache."""
    if isinstance(value, tuple):
        return all(map(_is_by_sample, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


def _select(value: Any, samples: torch.Tensor, num_samples: int) -> Any:
    """Rows of a tensor with one per sample; a leading 1 broadcasts, vectors run along tokens."""
    if isinstance(value, tuple):
        return tuple(_select(part, samples, num_samples) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == num_samples:
        return value[samples]
    return value
