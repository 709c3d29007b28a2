# SPDX-License-Identifier: Apache-2.0
"""Catch costs that do not go through the measured steps, and parts that take negative time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.measuring.hardware import GPUS, find_by_part
from vllm_layerskip.measuring.roofline import BYTES_ONLY, Roofline
from vllm_layerskip.measuring.shapes import SHAPES
from vllm_layerskip.tuning.costs import (
    MeasuredStep,
    RooflineCosts,
    design_cells,
    fit_costs,
)

times = st.floats(1e-5, 1e-1)


def _steps(cells, batch_size, verify, draft, layer):
    return [MeasuredStep(e, k, batch_size, verify + k * (draft + e * layer)) for e, k in cells]


@given(times, times, times, times)
def test_a_linear_step_is_found_again_for_each_batch_size(plain, verify, draft, layer):
    cells = design_cells(range(1, 12), range(1, 9))
    steps = _steps(cells, 1, verify, draft, layer) + _steps(cells, 8, 2 * verify, draft, layer)
    costs = fit_costs(steps, {1: plain, 8: 3 * plain})
    for e, k in ((1, 8), (5, 3), (11, 1), (7, 7)):
        for batch_size, factor in ((1, 1), (8, 2)):
            expected = factor * verify + k * (draft + e * layer)
            assert costs.step_s(e, k, batch_size) == pytest.approx(expected, rel=1e-4)
    assert (costs.plain_s(1), costs.plain_s(8)) == (plain, 3 * plain)
    assert all(c.worst_error < 1e-4 for c in costs.by_batch_size.values())


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), times), min_size=1, max_size=7))
def test_no_part_of_a_fit_is_negative(measured):
    (parts,) = fit_costs([MeasuredStep(e, k, 1, s) for e, k, s in measured], {1: 1.0}
                         ).by_batch_size.values()  # fmt: skip
    for value in (parts.verify_s, parts.draft_s, parts.layer_s):
        assert value >= 0
        assert math.isfinite(value)
    assert parts.step_s(3, 3) > 0


@pytest.mark.parametrize(("exit_layers", "drafts"), [([4], [1, 6]), ([2, 9], [5]), ([4], [5])])
def test_a_narrow_range_is_still_met_where_it_was_measured(exit_layers, drafts):
    steps = _steps(design_cells(exit_layers, drafts), 1, 2e-3, 1e-3, 5e-4)
    costs = fit_costs(steps, {1: 1e-3})
    for step in steps:
        fitted = costs.step_s(step.exit_layer, step.num_speculative_tokens, 1)
        assert fitted == pytest.approx(step.seconds, rel=1e-4)


def test_parts_that_steps_do_not_tell_apart_share_the_time():
    (parts,) = fit_costs([MeasuredStep(4, 6, 1, 0.3)], {1: 1.0}).by_batch_size.values()
    shares = (parts.verify_s, 6 * parts.draft_s, 24 * parts.layer_s)
    assert shares == pytest.approx((0.1, 0.1, 0.1), rel=1e-6)


def test_the_worst_error_is_that_of_the_worst_step():
    steps = _steps([(1, 1), (1, 8), (11, 1), (11, 8)], 1, 2e-3, 1e-3, 5e-4)
    steps.append(MeasuredStep(6, 4, 1, 2 * (2e-3 + 4 * 4e-3)))
    (parts,) = fit_costs(steps, {1: 1e-3}).by_batch_size.values()
    errors = [abs(parts.step_s(s.exit_layer, s.num_speculative_tokens) / s.seconds - 1)
              for s in steps]  # fmt: skip
    assert parts.worst_error == pytest.approx(max(errors))
    assert parts.worst_error > 0.1


def test_without_a_measured_step_there_are_no_costs():
    with pytest.raises(ValueError, match="no measured step"):
        fit_costs([MeasuredStep(1, 1, 1, 1.0)], {2: 1.0})


def test_design_cells_are_the_corners_and_the_middle():
    assert design_cells(range(1, 12), range(1, 9)) == [(1, 1), (1, 8), (11, 1), (11, 8), (6, 5)]
    assert design_cells([4], [6]) == [(4, 6)]
    assert set(design_cells([2, 3], [5])) == {(2, 5), (3, 5)}


def test_a_roofline_gives_the_speedup_of_the_design():
    """7B, E = 8, K = 12, acceptance length 9.27: 2.22 by bytes (docs/design.md)."""
    costs = RooflineCosts(Roofline(SHAPES["llama-2-7b"], BYTES_ONLY), context=0)
    assert 9.27 * costs.plain_s(1) / costs.step_s(8, 12, 1) == pytest.approx(2.22, abs=0.005)


def test_a_draft_vocabulary_makes_roofline_drafts_cheaper():
    roofline = Roofline(SHAPES["llama-3-8b"], BYTES_ONLY)
    small = RooflineCosts(roofline, 0, num_draft_vocab_ids=32000)
    assert small.step_s(4, 4, 1) < RooflineCosts(roofline, 0).step_s(4, 4, 1)


def test_roofline_drafts_are_cheaper_in_fewer_bits():
    roofline = Roofline(SHAPES["llama-2-7b"], BYTES_ONLY)
    steps = [
        RooflineCosts(roofline, 0, None, kind).step_s(8, 4, 1) for kind in ("int4", "int8", "none")
    ]
    assert steps == sorted(steps)
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("H200", "NVIDIA H200"),
        ("h100 pcie", "NVIDIA H100 PCIe"),
        ("l4", "NVIDIA L4"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        *[(name, name) for name in GPUS],
    ],
)
def test_hardware_is_found_by_a_word(part, name):
    assert find_by_part(part) == (name, GPUS[name])


@pytest.mark.parametrize("part", ["", " ", "h10", "tpu"])
def test_other_words_find_nothing(part):
    assert find_by_part(part) is None
