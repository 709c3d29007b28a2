# SPDX-License-Identifier: Apache-2.0
"""The kinds of numbers that a draft twin's weights may be, as data.

A draft twin (``worker/draft_twin.py``) is a copy of the layers that draft. It shares their modules
and K/V pages, and its linear layers have other weights: rounded to fewer bits, with an adapter
merged, or both.
"""

from __future__ import annotations

from dataclasses import dataclass

NONE = "none"
INT4 = "int4"
INT8 = "int8"
FP8 = "fp8"

GROUP_SIZES = (64, 128, 32)
"""Groups of int4 weights that share a scale, the preferred size first.

A group of 64 costs 0.3 bits a weight more than no groups, and loses less than one of 128.
"""


@dataclass(frozen=True)
class Kind:
    """Numbers of one kind."""

    name: str
    bits: int
    """Bits a weight, without scales."""
    what: str
    """For messages and documentation."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(INT4, 4, "4-bit integers with a scale and a zero point for each group of 64 inputs"),
        Kind(INT8, 8, "8-bit integers with a scale for each output"),
        Kind(FP8, 8, "8-bit floating point (E4M3) with a scale for each output"),
    )
}

CHOICES = (*KINDS, NONE)
"""Values of the option ``draft_quantization``."""


def group_sizes_of(num_inputs: int) -> tuple[int, ...]:
    """The group sizes that divide a linear layer's inputs, the preferred one first."""
    return tuple(size for size in GROUP_SIZES if num_inputs % size == 0)
