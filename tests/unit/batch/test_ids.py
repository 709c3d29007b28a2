# SPDX-License-Identifier: Apache-2.0
"""Catch two rows with one id, given or made up."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unit.batch.batch_jobs import read_output, run_job, write_rows
from vllm_layerskip.batch.ids import RowIds
from vllm_layerskip.batch.rows import PromptRow
from vllm_layerskip.errors import UserError


def ids_of(*given_ids):
    rows, ids = [PromptRow(i, row_id) for i, row_id in enumerate(given_ids)], RowIds()
    for row in rows:
        ids.add(row)
    return [ids.of(row) for row in rows]


def test_where_no_row_has_an_id_row_numbers_are_the_ids():
    assert ids_of(None, None) == [0, 1]


def test_a_made_up_id_says_so_and_is_nobody_elses():
    assert ids_of(1, 2, None, 3) == [1, 2, "row-2", 3]
    assert ids_of("row-1", None, "row-1-2") == ["row-1", "row-1-3", "row-1-2"]


IDS = st.none() | st.integers(0, 3) | st.sampled_from(["row-0", "row-1", "row-1-2", "row-2", "1"])


@given(
    st.lists(IDS, max_size=6).filter(
        lambda all_: len({*all_} - {None}) + all_.count(None) == len(all_)
    )
)
def test_ids_differ_whatever_is_given(given_ids):
    ids = ids_of(*given_ids)
    assert len(set(ids)) == len(ids)
    assert [new for new, old in zip(ids, given_ids, strict=True) if old is not None] == [
        old for old in given_ids if old is not None
    ]


def test_one_broken_line_does_not_refuse_the_job(tmp_path):
    rows = [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}, "{", {"prompt": "c", "id": 3}]
    files = [write_rows(tmp_path / "in.jsonl", *rows)]
    run_job(tmp_path / "out", files)
    assert [o["id"] for o in read_output(tmp_path / "out")] == [1, 2, "row-2", 3]
    parquet = pytest.importorskip("pyarrow.parquet")
    run_job(tmp_path / "out", files, output="output.parquet")
    table = parquet.read_table(tmp_path / "out" / "output.parquet")
    assert table["id"].to_pylist() == ["1", "2", "row-2", "3"]


def test_equal_ids_are_an_error_before_an_engine_starts(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}]
    files = [write_rows(tmp_path / "in.jsonl", *rows)]
    with pytest.raises(UserError, match="line 3: id 1 is that of row 2 of the input, too"):
        run_job(tmp_path / "out", files, pytest.fail)


def test_ids_that_would_be_one_text_are_refused_for_parquet_only(tmp_path):
    rows = [json.dumps({"prompt": "a", "id": 1}), json.dumps({"prompt": "a", "id": "1"})]
    files = [write_rows(tmp_path / "in.jsonl", *rows)]
    with pytest.raises(UserError, match=r"ids 1 and '1' \(rows 1 and 2 of the input\) would be"):
        run_job(tmp_path / "out", files, pytest.fail, output="output.parquet")
    run_job(tmp_path / "out", files)
    assert [o["id"] for o in read_output(tmp_path / "out")] == [1, "1"]
