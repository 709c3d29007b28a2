# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest quantisation of a weight, and back.

Shapes: N outputs, M inputs, G groups of a row; a weight is ``[N, M]``, as in ``nn.Linear``. All
arithmetic is in float32. Rows are rounded a few thousand at a time, so that a large LM head needs
little memory beside its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_layerskip.twins.kinds import FP8, INT4, INT8, group_sizes_of

ROWS_AT_ONCE = 4096
"""Bounds the memory beside a result."""
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Rounded:
    """A weight of few bits: ``(values - zero_points) * scales``, group by group."""

    values: torch.Tensor
    """``[N, M]``: uint8 from 0 to 15 (int4), int8, or float8_e4m3fn."""
    scales: torch.Tensor
    """``[N, G]`` float32; G = 1 without groups, ``[1, 1]`` with one scale for all."""
    zero_points: torch.Tensor | None = None
    """``[N, G]`` uint8 from 0 to 15; None where zero is a value."""

    def dequantize(self) -> torch.Tensor:
        """``[N, M]`` float32."""
        num_rows, num_inputs = self.values.shape
        scales, zeros = self.scales, self.zero_points
        num_groups = scales.shape[1]
        values = self.values.float().view(num_rows, num_groups, num_inputs // num_groups)
        if zeros is not None:
            values = values - zeros.float().unsqueeze(2)
        return (values * scales.unsqueeze(2)).view(num_rows, num_inputs)


def round_int4(
    weight: torch.Tensor,  # [N, M]
    group_size: int,
    symmetric: bool = False,
) -> Rounded:
    """4 bits, with a scale and a zero point a group; symmetric: the zero point is 8.

    Raises:
        ValueError: ``group_size`` does not divide M.
    """
    if weight.shape[1] % group_size:
        raise ValueError(f"{weight.shape[1]} inputs cannot be cut into groups of {group_size}.")

    def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = rows.view(rows.shape[0], -1, group_size)
        low = groups.amin(2).clamp_(max=0)
        high = groups.amax(2).clamp_(min=0)
        if symmetric:
            scales = _nonzero(torch.maximum(-low / 8, high / 7))
            zeros = torch.full_like(scales, 8)
        else:
            scales = _nonzero((high - low) / 15)
            zeros = (-low / scales).round_().clamp_(0, 15)
        values = (groups / scales.unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(0, 15)
        return values.view_as(rows).to(torch.uint8), scales, zeros.to(torch.uint8)

    return Rounded(*_by_rows(weight, rounded))


def round_int8(
    weight: torch.Tensor,  # [N, M]
) -> Rounded:
    """8-bit integers, symmetric, with a scale for each output."""

    def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scales = _nonzero(rows.abs().amax(1, keepdim=True) / 127)
        return (rows / scales).round_().to(torch.int8), scales

    return Rounded(*_by_rows(weight, rounded))


def round_fp8(
    weight: torch.Tensor,  # [N, M]
    per_output: bool = True,
) -> Rounded:
    """E4M3, with a scale for each output or, if not ``per_output``, one for the whole weight."""
    largest = torch.finfo(_FP8).max
    whole = None if per_output else _nonzero(weight.abs().amax().float().view(1, 1) / largest)

    def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scales = _nonzero(rows.abs().amax(1, keepdim=True) / largest) if whole is None else whole
        return (rows / scales).clamp_(-largest, largest).to(_FP8), scales

    values, scales = _by_rows(weight, rounded)
    return Rounded(values, scales if whole is None else whole)


def round_trip(
    weight: torch.Tensor,  # [N, M]
    kind: str,
) -> torch.Tensor:
    """``weight`` as a twin of ``kind`` has it, in its own dtype.

    A weight whose inputs cannot be cut into groups stays as it is, as in a twin.
    """
    if kind == INT4:
        sizes = group_sizes_of(weight.shape[1])
        rounded = round_int4(weight, sizes[0]) if sizes else None
    else:
        rounded = {INT8: round_int8, FP8: round_fp8}[kind](weight)
    return weight.clone() if rounded is None else rounded.dequantize().to(weight.dtype)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """Scales of groups of zeros are 1."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _by_rows(
    weight: torch.Tensor, rounded: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """``rounded`` over a few thousand rows at a time, its results joined."""
    with torch.no_grad():
        parts = [rounded(rows.float().contiguous()) for rows in weight.split(ROWS_AT_ONCE)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
