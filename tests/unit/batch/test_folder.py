# SPDX-License-Identifier: Apache-2.0
"""Catch two jobs that mix their answers, and a file of somebody else that is removed."""

from __future__ import annotations

import json

import pytest

from unit.batch.batch_jobs import DEFAULTS
from vllm_layerskip.batch.folder import claim, clear
from vllm_layerskip.batch.settings import JobSettings
from vllm_layerskip.errors import UserError

SETTINGS = JobSettings("m", {"method": "layerskip"}, {}, DEFAULTS, [("in.jsonl", "1")])


def test_a_folder_belongs_to_one_job(tmp_path):
    folder = tmp_path / "out"
    assert not claim(folder, SETTINGS)
    assert claim(folder, SETTINGS)
    other = JobSettings("m", None, {}, DEFAULTS, [("in.jsonl", "2")])
    with pytest.raises(UserError, match=r"(?s)speculative_config: .*input: .*--overwrite"):
        claim(folder, other)
    clear(folder)
    assert not claim(folder, other)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="it is not empty"):
        claim(tmp_path, SETTINGS)
    clear(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_what_a_killed_run_left_half_written_does_no_harm(tmp_path):
    (tmp_path / ".settings.json.1.unfinished").touch()
    assert not claim(tmp_path, SETTINGS)
    (tmp_path / ".output.jsonl.1.unfinished").touch()
    (tmp_path / ".mine.unfinished").touch()
    assert claim(tmp_path, SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", ".mine.unfinished"}
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".mine.unfinished"]


def test_settings_are_written_as_earlier_versions_read_them(tmp_path):
    claim(tmp_path, SETTINGS)
    written = json.loads((tmp_path / "settings.json").read_text())
    assert written == {
        "model": "m",
        "speculative_config": {"method": "layerskip"},
        "engine_args": {},
        "sampling_params": DEFAULTS,
        "input": [["in.jsonl", "1"]],
    }
