# SPDX-License-Identifier: Apache-2.0
"""The byte limit that benchmark tables print beside what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import compare
    finally:
        sys.path.remove(str(BENCHMARKS))
    return compare


def test_limit_of_the_7b_shape(compare):
    """E = 8, K = 12, acceptance length 9.27: 2.22, worked out by hand from the weights."""
    limit = compare.byte_limit(compare.SHAPES["llama-2-7b"], 8, 12, 9.27)
    assert limit == pytest.approx(2.22, abs=0.005)


def test_drafting_for_nothing_costs_more_than_plain_decoding(compare):
    for shape in compare.SHAPES.values():
        assert compare.byte_limit(shape, 1, 1, 1.0) < 1.0
        assert compare.byte_limit(shape, 1, 1, 2.0) > 1.0
