# SPDX-License-Identifier: Apache-2.0
"""Catch a training recipe that is not the paper's (arXiv 2404.16710, section 4.1): the expected
numbers were worked out by hand from its formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.training import recipe
from vllm_layerskip.training.recipe import Recipe

ROOT = 2**0.25  # exp(ln 2 / 4): one of four steps of D and S from 0 to 1.


def _close(expected):
    return pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (1, [0]),
        (2, [0, 1]),
        (3, [0, math.sqrt(2) - 1, 1]),
        (5, [0, ROOT - 1, ROOT**2 - 1, ROOT**3 - 1, 1]),
    ],
)
def test_dropout_doubles_its_distance_from_minus_one_over_the_depth(num_layers, expected):
    assert recipe.layer_dropout_profile(num_layers) == _close(expected)


@pytest.mark.parametrize(
    ("step", "num_steps", "expected"),
    [
        (0, 5, 0),
        (1, 5, ROOT - 1),
        (2, 5, ROOT**2 - 1),
        (4, 5, 1),
        (9, 5, 1),
        (0, 1, 1),
        (50, 101, math.sqrt(2) - 1),
    ],
)
def test_dropout_from_scratch_grows_over_the_run(step, num_steps, expected):
    assert recipe.layer_dropout_time_scale(step, num_steps, True) == _close(expected)
    assert recipe.layer_dropout_time_scale(step, num_steps, False) == 1


def test_dropout_rates_are_depth_times_time_times_p_max():
    half = math.sqrt(2) - 1
    scratch = Recipe(max_layer_dropout=0.2)
    assert recipe.layer_dropout_rates(scratch, 3, 0, 3) == _close([0, 0, 0])
    assert recipe.layer_dropout_rates(scratch, 3, 1, 3) == _close([0, 0.2 * half**2, 0.2 * half])
    assert recipe.layer_dropout_rates(scratch, 3, 2, 3) == _close([0, 0.2 * half, 0.2])
    continual = Recipe(max_layer_dropout=0.1, from_scratch=False)
    for step in range(3):
        assert recipe.layer_dropout_rates(continual, 3, step, 3) == _close([0, 0.1 * half, 0.1])


@pytest.mark.parametrize(
    ("num_layers", "exit_loss_scale", "expected"),
    [
        # e(l) = e_scale * (0 + 1 + ... + l), e(L-1) = L-1 + e_scale * (0 + 1 + ... + L-2).
        (5, 0.2, [0, 0.2, 0.6, 1.2, 4 + 1.2]),
        (5, 1.0, [0, 1, 3, 6, 4 + 6]),
        (5, 0.0, [0, 0, 0, 0, 4]),
        (2, 0.5, [0, 1]),
        (3, 0.1, [0, 0.1, 2 + 0.1]),
    ],
)
def test_exit_scales_are_the_papers(num_layers, exit_loss_scale, expected):
    assert recipe.exit_scales(num_layers, exit_loss_scale) == _close(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, [0, 0, 0.6 / 5.8, 0, 5.2 / 5.8]),
        (1, [0, 0.2 / 6.6, 0, 1.2 / 6.6, 5.2 / 6.6]),
        (2, [0, 0, 0.6 / 5.8, 0, 5.2 / 5.8]),
    ],
)
def test_loss_weights_share_what_the_enabled_exits_have(step, expected):
    rotational = Recipe(exit_loss_scale=0.2, rotation=2)
    assert recipe.exit_loss_weights(rotational, 5, step, 10) == _close(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, [0, 4, 7]),
        (1, [1, 5, 7]),
        (2, [2, 6, 7]),
        (3, [3, 7]),
        (4, [0, 4, 7]),
    ],
)
def test_rotational_takes_every_rth_layer_and_moves_on_by_one(step, expected):
    enabled = recipe.enabled_exits(Recipe(rotation=4), 8, step, 100)
    assert [layer for layer, on in enumerate(enabled) if on] == expected


@pytest.mark.parametrize(
    ("step", "first"),
    [(0, 3), (1, 3), (2, 2), (3, 2), (4, 1), (5, 1), (6, 0), (8, 0), (15, 0)],
)
def test_gradual_adds_a_layer_every_t_over_2l_steps_from_the_last_one_down(step, first):
    enabled = recipe.enabled_exits(Recipe(curriculum="gradual"), 4, step, 16)
    assert enabled == [layer >= first for layer in range(4)]


# Tables for L = 4 and L = 32, from powers of the third and the 31st root of two (root finding and
# multiplication in decimals, no exponential) and from sums of integers.
D_4 = [0.0, 0.25992105, 0.58740105, 1.0]
D_32 = [
    0.00000000,
    0.02261144,
    0.04573415,
    0.06937970,
    0.09355991,
    0.11828687,
    0.14357294,
    0.16943077,
    0.19587327,
    0.22291369,
    0.25056552,
    0.27884260,
    0.30775907,
    0.33732938,
    0.36756832,
    0.39849100,
    0.43011289,
    0.46244979,
    0.49551788,
    0.52933369,
    0.56391412,
    0.59927646,
    0.63543840,
    0.67241801,
    0.71023378,
    0.74890462,
    0.78844987,
    0.82888929,
    0.87024310,
    0.91253198,
    0.95577707,
    1.00000000,
]
E_4 = [0, 0.2, 0.6, 3.6]  # e_scale = 0.2; the last: 3 + 0.2 * (0 + 1 + 2).
# fmt: off
E_32 = [0.0, 0.2, 0.6, 1.2, 2.0, 3.0, 4.2, 5.6, 7.2, 9.0, 11.0, 13.2, 15.6, 18.2, 21.0, 24.0, 27.2,
        30.6, 34.2, 38.0, 42.0, 46.2, 50.6, 55.2, 60.0, 65.0, 70.2, 75.6, 81.2, 87.0, 93.0, 124.0]
# fmt: on


@pytest.mark.parametrize(("num_layers", "table"), [(4, D_4), (32, D_32)])
def test_dropout_follows_the_table(num_layers, table):
    profile = recipe.layer_dropout_profile(num_layers)
    assert profile == pytest.approx(table, abs=5e-9)
    continual = Recipe(max_layer_dropout=0.1, from_scratch=False)
    rates = recipe.layer_dropout_rates(continual, num_layers, 7, 100)
    assert rates == pytest.approx([0.1 * depth for depth in table], abs=5e-10)
    # From scratch, S of step 2 of 4 is 2^(2/3) - 1.
    scratch = recipe.layer_dropout_rates(Recipe(max_layer_dropout=0.1), num_layers, 2, 4)
    assert scratch == pytest.approx([0.058740105 * depth for depth in table], abs=5e-9)


@pytest.mark.parametrize(("num_layers", "table"), [(4, E_4), (32, E_32)])
def test_scales_follow_the_table(num_layers, table):
    assert recipe.exit_scales(num_layers, 0.2) == pytest.approx(table, abs=1e-9)


@pytest.mark.parametrize(
    ("num_layers", "rotation", "step", "expected"),
    [
        (4, 2, 0, {0: 0, 2: 0.6 / 4.2, 3: 3.6 / 4.2}),
        (4, 2, 1, {1: 0.2 / 3.8, 3: 3.6 / 3.8}),
        (4, 1, 5, {0: 0, 1: 0.2 / 4.4, 2: 0.6 / 4.4, 3: 3.6 / 4.4}),
        (32, 8, 0, {0: 0, 8: 0.03296703, 16: 0.12454212, 24: 0.27472527, 31: 0.56776557}),
        (32, 8, 3, {3: 0.00476190, 11: 0.05238095, 19: 0.15079365, 27: 0.3, 31: 0.49206349}),
        (32, 8, 7, {7: 0.02681992, 15: 0.11494253, 23: 0.26436782, 31: 0.59386973}),
        (32, 31, 2, {2: 0.6 / 124.6, 31: 124 / 124.6}),
    ],
)
def test_weights_follow_the_table(num_layers, rotation, step, expected):
    knobs = Recipe(exit_loss_scale=0.2, rotation=rotation)
    weights = recipe.exit_loss_weights(knobs, num_layers, step, 1000)
    table = [expected.get(layer, 0.0) for layer in range(num_layers)]
    assert weights == pytest.approx(table, abs=5e-9)


@pytest.mark.parametrize(
    ("curriculum", "step", "expected"),
    [
        # Exits 8, 16, 24 and the last one, 32, count as four: e = 0.2 * (28, 120, 276), 124.
        ("rotational", 0, {7: 5.6 / 184.8, 23: 55.2 / 184.8, 31: 124 / 184.8}),
        ("rotational", 1, {15: 24 / 148, 31: 124 / 148}),
        ("gradual", 0, {31: 1}),
        ("gradual", 2, {23: 55.2 / 179.2, 31: 124 / 179.2}),
        ("gradual", 8, {7: 5.6 / 208.8, 15: 24 / 208.8, 23: 55.2 / 208.8, 31: 124 / 208.8}),
    ],
)
def test_a_subset_of_exits_takes_turns_among_itself(curriculum, step, expected):
    knobs = Recipe(
        exit_loss_scale=0.2, rotation=2, curriculum=curriculum, exit_layers=(24, 8, 16, 8)
    )
    assert knobs.exit_layers == (8, 16, 24)
    weights = recipe.exit_loss_weights(knobs, 32, step, 16)
    assert weights == pytest.approx([expected.get(layer, 0.0) for layer in range(32)], abs=1e-12)


@pytest.mark.parametrize(
    ("knobs", "num_layers", "expected"),
    [
        (Recipe(rotation=5), 4, "rotation=5 (R) must be at most 4"),
        (Recipe(rotation=3, exit_layers=(2,)), 4, "rotation=3 (R) must be at most 2"),
        (Recipe(rotation=1, exit_layers=(2, 6)), 4, "exit_layers=[2, 6] must lie in 2..4"),
    ],
)
def test_a_recipe_that_does_not_fit_the_depth_is_refused(knobs, num_layers, expected):
    with pytest.raises(ValueError, match="must") as error:
        knobs.check_depth(num_layers)
    assert expected in str(error.value)


def test_a_recipe_that_fits_the_depth_is_not():
    Recipe(rotation=4).check_depth(4)
    Recipe(rotation=9, curriculum="gradual").check_depth(4)
    Recipe(rotation=2, exit_layers=(2,)).check_depth(4)
    Recipe(rotation=2, exit_layers=(2, 4)).check_depth(4)
    Recipe.off().check_depth(1)


_layers = st.integers(1, 40)
_recipes = st.builds(
    Recipe,
    max_layer_dropout=st.floats(0, 0.99),
    exit_loss_scale=st.floats(0, 1),
    curriculum=st.sampled_from(["rotational", "gradual"]),
    rotation=st.integers(1, 50),
    from_scratch=st.booleans(),
)
_progress = st.integers(1, 500).flatmap(
    lambda num_steps: st.tuples(st.integers(0, num_steps - 1), st.just(num_steps))
)


@given(_recipes, _layers, _progress)
def test_loss_weights_sum_to_one_and_never_leave_the_last_layer_out(knobs, num_layers, progress):
    weights = recipe.exit_loss_weights(knobs, num_layers, *progress)
    assert len(weights) == num_layers
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0
    assert weights[-1] == max(weights) > 0


@given(_recipes, _layers, _progress)
def test_dropout_rates_grow_with_depth_and_time_up_to_p_max(knobs, num_layers, progress):
    step, num_steps = progress
    rates = recipe.layer_dropout_rates(knobs, num_layers, step, num_steps)
    assert len(rates) == num_layers
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] <= knobs.max_layer_dropout + 1e-12
    earlier = recipe.layer_dropout_rates(knobs, num_layers, step // 2, num_steps)
    assert all(before <= now for before, now in zip(earlier, rates, strict=True))
    last = recipe.layer_dropout_rates(knobs, num_layers, num_steps - 1, num_steps)[-1]
    assert num_layers == 1 or last == pytest.approx(knobs.max_layer_dropout)


@given(st.integers(1, 50), _layers, st.integers(0, 400))
def test_rotational_visits_every_layer_once_in_r_steps(rotation, num_layers, step):
    knobs = Recipe(rotation=rotation)
    turns = [recipe.enabled_exits(knobs, num_layers, step + i, 1000) for i in range(rotation)]
    visits = [sum(turn[layer] for turn in turns) for layer in range(num_layers)]
    assert visits[:-1] == [1] * (num_layers - 1)
    assert visits[-1] == rotation
    # What the paper pays a step: ceil(L / R) exits, and here always the last one.
    assert max(map(sum, turns)) <= math.ceil(num_layers / rotation) + 1


@given(_layers, st.integers(1, 500))
def test_gradual_starts_with_the_last_layer_alone_and_has_all_from_half_time(num_layers, num_steps):
    knobs = Recipe(curriculum="gradual")
    counts = [
        sum(recipe.enabled_exits(knobs, num_layers, step, num_steps)) for step in range(num_steps)
    ]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert set(counts[math.ceil(num_steps / 2) :]) <= {num_layers}


@given(st.integers(2, 40), _progress)
def test_the_twins_recipe_trains_the_last_layer_only_and_drops_none(num_layers, progress):
    weights = recipe.exit_loss_weights(Recipe.off(), num_layers, *progress)
    assert weights == [0.0] * (num_layers - 1) + [1.0]
    assert recipe.layer_dropout_rates(Recipe.off(), num_layers, *progress) == [0.0] * num_layers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_layer_dropout", -0.1),
        ("max_layer_dropout", 1.0),
        ("max_layer_dropout", math.nan),
        ("exit_loss_scale", -0.1),
        ("exit_loss_scale", 1.5),
        ("curriculum", "random"),
        ("curriculum", ""),
        ("rotation", 0),
        ("rotation", -1),
    ],
)
def test_a_value_outside_of_its_formulas_range_is_refused(name, value):
    with pytest.raises(ValueError, match="must be") as error:
        Recipe(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
