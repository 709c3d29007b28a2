# SPDX-License-Identifier: Apache-2.0
"""Rounding of weights: its error is bounded by half a step, and exact values stay exact."""

from __future__ import annotations

import pytest
import torch

from vllm_layerskip.twins.kinds import CHOICES, KINDS, group_sizes_of
from vllm_layerskip.twins.rounding import (
    ROWS_AT_ONCE,
    Rounded,
    round_fp8,
    round_int4,
    round_int8,
    round_trip,
)


def weight(num_rows: int = 96, num_inputs: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(seed))


def steps_of(rounded: Rounded, shape: torch.Size) -> torch.Tensor:
    """The distance between neighbouring values, for each weight."""
    return rounded.scales.repeat_interleave(shape[1] // rounded.scales.shape[1], dim=1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_is_within_a_step(group_size, symmetric):
    """Half a step by rounding; an asymmetric zero point is rounded, too."""
    original = weight()
    rounded = round_int4(original, group_size, symmetric)
    error = (rounded.dequantize() - original).abs() / steps_of(rounded, original.shape)
    assert error.max() <= (0.5 if symmetric else 1.0) + 1e-4
    assert error.mean() < 0.3
    assert rounded.values.max() <= 15
    assert rounded.scales.shape == (96, 128 // group_size)


def test_int8_is_within_half_a_step():
    original = weight()
    rounded = round_int8(original)
    error = (rounded.dequantize() - original).abs() / steps_of(rounded, original.shape)
    assert error.max() <= 0.5 + 1e-4
    assert rounded.values.abs().max() == 127


@pytest.mark.parametrize("per_output", [True, False])
def test_fp8_keeps_four_significant_bits(per_output):
    original = weight()
    rounded = round_fp8(original, per_output)
    large = original.abs() > 0.02
    relative = ((rounded.dequantize() - original) / original).abs()[large]
    assert relative.max() <= 2**-4 + 1e-5
    assert rounded.scales.shape == ((96, 1) if per_output else (1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_lose_less_and_zero_is_exact(kind):
    original = weight()
    original[3] = 0
    back = round_trip(original, kind)
    assert torch.equal(back[3], original[3])
    assert back.isfinite().all()
    error = (back - original).abs().mean()
    assert 0 < error < {"int4": 0.12, "int8": 0.01, "fp8": 0.03}[kind]


def test_a_weight_on_the_grid_stays_what_it_is():
    """A second round trip changes nothing: what was rounded once lies on the grid."""
    once = round_int8(weight()).dequantize()
    assert torch.allclose(round_int8(once).dequantize(), once, atol=1e-6)
    grid = torch.randint(0, 16, (8, 64)).float()
    grid[:, 0], grid[:, 1] = 0, 15
    assert torch.equal(round_int4(grid - 5, 64).dequantize(), grid - 5)


def test_many_rows_are_rounded_as_few_are():
    many = weight(ROWS_AT_ONCE + 5, 64)
    for rounded in (lambda rows: round_int4(rows, 32), round_int8, round_fp8):
        whole, last = rounded(many), rounded(many[-5:])
        assert torch.equal(whole.dequantize()[-5:], last.dequantize())


def test_bfloat16_weights_are_rounded_in_float32():
    original = weight().bfloat16()
    assert torch.equal(
        round_int4(original, 64).dequantize(), round_int4(original.float(), 64).dequantize()
    )
    assert round_trip(original, "int8").dtype == torch.bfloat16


def test_groups_divide_the_inputs():
    assert group_sizes_of(4096) == (64, 128, 32)
    assert group_sizes_of(576) == (64, 32)
    assert group_sizes_of(96) == (32,)
    assert group_sizes_of(50) == ()
    odd = weight(4, 50)
    assert torch.equal(round_trip(odd, "int4"), odd)
    with pytest.raises(ValueError, match="50 inputs cannot be cut into groups of 32"):
        round_int4(odd, 32)


def test_the_choices():
    assert CHOICES == ("int4", "int8", "fp8", "none")
    assert [kind.bits for kind in KINDS.values()] == [4, 8, 8]
