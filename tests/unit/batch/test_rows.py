# SPDX-License-Identifier: Apache-2.0
"""Catch two rows with one id, and an input that is not what its name says."""

from __future__ import annotations

import pytest

from unit.batch.batch_jobs import DEFAULTS, write_rows
from vllm_layerskip.batch.rows import input_files, read_rows
from vllm_layerskip.errors import UserError


def test_equal_ids_are_an_error_before_an_engine_starts(tmp_path):
    files = [write_rows(tmp_path / "in.jsonl", {"prompt": "a", "id": 1}, {"prompt": "b"})]
    with pytest.raises(UserError, match="line 2: id 1 is row 0's, too"):
        list(read_rows(files, DEFAULTS))


def test_folders_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert [f.name for f in input_files([tmp_path])] == ["a.jsonl", "b.jsonl"]
    assert [f.name for f in input_files([tmp_path / "b*"])] == ["b.jsonl"]
    with pytest.raises(UserError, match="unknown kind of file"):
        input_files([tmp_path / "notes.txt"])
    with pytest.raises(UserError, match="there is no such file"):
        input_files([tmp_path / "none.jsonl"])
