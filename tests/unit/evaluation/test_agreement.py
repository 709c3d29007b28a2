# SPDX-License-Identifier: Apache-2.0
"""Catch acceptance that is not the walk's, and files that are read as something else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unit.evaluation.reference import accepted_runs
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement

Y, N = True, False


@pytest.mark.parametrize(
    ("row", "num_speculative_tokens", "expected"),
    [
        ([Y, Y, Y, Y], 1, [1, 1]),
        ([N, N, N, N], 1, [0, 0, 0]),
        ([Y, N, Y, Y, N, Y], 2, [1, 2]),
        ([Y, Y, N, N, Y, Y, Y], 2, [2, 0, 2]),
        ([N, Y, Y, Y, Y], 3, [0, 3]),
        # Too short for one step's drafts and the token after them.
        ([Y, Y, Y], 3, []),
        ([], 1, []),
    ],
)
def test_a_step_ends_at_the_first_mismatch_and_takes_one_token_more(
    row, num_speculative_tokens, expected
):
    assert accepted_runs(row, num_speculative_tokens) == expected


@given(
    st.lists(st.lists(st.booleans(), max_size=20), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_acceptance_lengths_are_those_of_the_step_by_step_walk(rows, max_k):
    matches = tuple(np.array([row, [not m for m in row]], dtype=bool) for row in rows)
    lengths = Agreement((2, 5), matches, 1.0).acceptance_lengths(max_k)
    assert lengths.shape == (2, max_k)
    for exit_index in range(2):
        for num_drafts in range(1, max_k + 1):
            runs = [
                run
                for row in matches
                for run in accepted_runs(row[exit_index].tolist(), num_drafts)
            ]
            expected = 1 + sum(runs) / len(runs) if runs else np.nan
            assert lengths[exit_index, num_drafts - 1] == pytest.approx(expected, nan_ok=True)


def test_acceptance_length_is_the_mean_over_the_steps_of_all_rows():
    # Steps: 2, 2 and 0, 0, 0, 0.
    rows = ([Y, Y, N, Y, Y, Y], [N, N, N, N, Y, Y])
    agreement = Agreement((1,), tuple(np.array([row]) for row in rows), 1.0)
    expected = (3 + 3 + 1 + 1 + 1 + 1) / 6
    assert agreement.acceptance_lengths(2)[0, 1] == pytest.approx(expected)


def test_a_file_is_read_back(tmp_path):
    matches = (np.array([[True, False]]), np.zeros((1, 0), dtype=bool), np.array([[True]]))
    path = tmp_path / "agreement.npz"
    Agreement((3,), matches, 0.5).save(path, "digest")
    agreement, identity = Agreement.load(path)
    assert (agreement.exit_layers, agreement.target_agreement, identity) == ((3,), 0.5, "digest")
    for ours, theirs in zip(agreement.matches, matches, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["agreement.npz"]


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04cut off"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "agreement.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--agreement .*no file of agreement statistics"):
        Agreement.load(path)
