# SPDX-License-Identifier: Apache-2.0
"""Catch a choice that is not the best, drafting where it does not pay, and a schedule that vLLM
does not take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.config.options import checked_schedule
from vllm_layerskip.tuning.drafts import OWN, Draft
from vllm_layerskip.tuning.schedule import candidates, choose, choose_draft, make_schedule


def test_one_batch_size_is_the_best_cell():
    choice = choose({(2, 1, 1): 1.1, (2, 4, 1): 1.3, (3, 4, 1): 1.25, (5, 6, 1): 0.9})
    assert (choice.exit_layer, choice.num_speculative_tokens) == (2, 4)
    assert choice.schedule == ((1, 1, 4),)
    assert choice.speedups == {1: 1.3}
    assert choice.pays


def test_k_falls_with_the_batch_down_to_nothing():
    speedups = {
        (3, 2, 1): 1.2, (3, 6, 1): 1.5, (3, 2, 8): 1.15, (3, 6, 8): 1.1, (3, 2, 32): 0.9,
        (3, 6, 32): 0.6,
    }  # fmt: skip
    choice = choose(speedups)
    assert (choice.exit_layer, choice.num_speculative_tokens) == (3, 6)
    assert choice.schedule == ((1, 1, 6), (2, 8, 2), (9, 32, 0))
    assert choice.speedups == {1: 1.5, 8: 1.15, 32: 1.0}


def test_the_exit_layer_is_the_best_over_all_batch_sizes():
    speedups = {(2, 4, 1): 1.6, (2, 4, 8): 1.0, (4, 4, 1): 1.5, (4, 4, 8): 1.3}
    assert choose(speedups).exit_layer == 4
    # A loss counts as plain decoding, which the schedule falls back to.
    assert choose({**speedups, (4, 4, 8): 0.1}).exit_layer == 2


def test_where_nothing_pays_the_schedule_is_zero_and_the_pair_the_least_bad():
    choice = choose({(1, 1, 1): 0.7, (2, 3, 1): 0.8, (2, 1, 4): 0.9, (2, 3, 4): 0.5})
    assert not choice.pays
    assert (choice.exit_layer, choice.num_speculative_tokens) == (2, 3)
    assert choice.schedule == ((1, 4, 0),)
    assert choice.speedups == {1: 1.0, 4: 1.0}


def test_of_equals_the_smaller_wins():
    choice = choose({(e, k, 1): 1.5 for e in (4, 2, 3) for k in (5, 3)})
    assert (choice.exit_layer, choice.num_speculative_tokens) == (2, 3)


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match="nothing"):
        choose({})


cells = st.dictionaries(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 3, 16])),
    st.floats(0.2, 3.0),
    min_size=1,
)


@given(cells)
def test_a_schedule_is_one_that_vllm_takes_and_never_slower_than_it_says(speedups):
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    choice = choose(speedups)
    schedule = checked_schedule([list(entry) for entry in choice.schedule], "here")
    lookup = build_dynamic_sd_schedule_lookup(schedule, 16, choice.num_speculative_tokens)
    for batch_size in {size for _, _, size in speedups}:
        drafts = lookup[batch_size]
        value = 1.0 if drafts == 0 else speedups[choice.exit_layer, drafts, batch_size]
        assert value == choice.speedups[batch_size]
        assert value >= 1.0


@given(cells)
def test_with_one_batch_size_no_cell_beats_the_choice(speedups):
    one = {(e, k, 1): value for (e, k, _), value in speedups.items()}
    choice = choose(one)
    cell = (choice.exit_layer, choice.num_speculative_tokens, 1)
    assert one[cell] == max(one.values())


def test_batches_between_two_measured_ones_get_the_larger_ones_k():
    assert make_schedule({1: 6, 8: 6, 32: 2, 64: 0}) == ((1, 8, 6), (9, 32, 2), (33, 64, 0))
    assert make_schedule({4: 3}) == ((1, 4, 3),)


def test_candidates_begin_with_what_the_choice_needs():
    speedups = {
        (3, 6, 1): 1.5, (3, 2, 1): 1.2, (3, 6, 8): 1.1, (3, 2, 8): 1.3,
        (4, 6, 1): 1.45, (4, 2, 1): 1.1, (4, 6, 8): 1.0, (4, 2, 8): 1.05,
    }  # fmt: skip
    cells = [(3, 6), (3, 2), (4, 6), (4, 2)]
    assert candidates({OWN: speedups}) == [(OWN, cell) for cell in cells]


INT4, INT8 = Draft("int4"), Draft("int8")


def test_each_draft_has_a_candidate_before_the_rest_by_speed():
    """Predictions of two drafts err in their own ways, so one must not shut out the other."""
    own = {(3, 4, 1): 1.2, (4, 4, 1): 1.19, (5, 4, 1): 1.18}
    found = candidates({OWN: own, INT4: {(9, 4, 1): 1.5, (8, 4, 1): 1.1}, INT8: {(9, 4, 1): 0.8}})
    assert found[:3] == [(INT4, (9, 4)), (OWN, (3, 4)), (INT8, (9, 4))]
    assert found[3:] == [(OWN, (4, 4)), (OWN, (5, 4)), (INT4, (8, 4))]


def test_the_draft_is_the_one_with_the_largest_mean_speedup():
    own = {(2, 4, 1): 1.6, (2, 4, 8): 1.0}
    int4 = {(6, 4, 1): 1.5, (6, 2, 8): 1.3, (6, 4, 8): 1.1}
    choice = choose_draft({OWN: own, INT4: int4})
    assert (choice.draft, choice.exit_layer, choice.num_speculative_tokens) == (INT4, 6, 4)
    assert choice.schedule == ((1, 1, 4), (2, 8, 2))
    assert choice.to_dict()["draft_quantization"] == "int4"
    slower = {cell: value / 1.2 for cell, value in int4.items()}
    choice = choose_draft({OWN: own, INT4: slower})
    assert (choice.draft, choice.exit_layer) == (OWN, 2)
    assert "draft_quantization" not in choice.to_dict()
    assert choose_draft({OWN: own, INT4: own}).draft == OWN  # Of equals the first one.


def test_where_no_draft_pays_the_one_that_loses_the_least_stands():
    choice = choose_draft({OWN: {(1, 1, 1): 0.7}, INT4: {(4, 1, 1): 0.9}, INT8: {(4, 1, 1): 0.8}})
    assert choice.draft == INT4
    assert not choice.pays
