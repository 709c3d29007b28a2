# SPDX-License-Identifier: Apache-2.0
"""Catch two jobs that mix their answers, and a file of somebody else that is removed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from unit.batch.batch_jobs import DEFAULTS
from vllm_layerskip.batch.folder import check, claim, clear
from vllm_layerskip.batch.settings import JobSettings
from vllm_layerskip.errors import UserError

SETTINGS = JobSettings("m", {"method": "layerskip"}, {}, DEFAULTS, [("in.jsonl", "1")])
OTHER = JobSettings("m", None, {}, DEFAULTS, [("in.jsonl", "2")])


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_folder_belongs_to_one_job(tmp_path):
    folder = tmp_path / "out"
    assert not check(folder, SETTINGS, overwrite=False)
    claim(folder, SETTINGS)
    assert check(folder, SETTINGS, overwrite=False)
    for refuses in (check, claim):
        with pytest.raises(UserError, match="speculative_config {.*; input .*--overwrite"):
            refuses(folder, OTHER, overwrite=False)
    assert not check(folder, OTHER, overwrite=True)
    claim(folder, OTHER, overwrite=True)
    assert check(folder, OTHER, overwrite=False)


def test_a_check_makes_and_removes_nothing(tmp_path):
    folder = tmp_path / "a" / "out"
    check(folder, SETTINGS, overwrite=True)
    assert names(tmp_path) == set()
    claim(folder, SETTINGS)
    for name in ("output.jsonl", ".output.jsonl.1.unfinished", "answers.partial.jsonl"):
        (folder / name).touch()
    before = names(folder)
    for overwrite in (False, True):
        check(folder, SETTINGS, overwrite)
    assert names(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("mine")
    for refuses in (check, claim):
        with pytest.raises(UserError, match="it is not empty"):
            refuses(tmp_path, SETTINGS, overwrite)
    clear(tmp_path)
    assert names(tmp_path) == {"thesis.txt"}


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file/out: .*Choose another folder"):
        check(tmp_path / "file" / "out", SETTINGS, overwrite=False)


@pytest.mark.parametrize("content", ["", "3", "[]x", "[1]"])
def test_damaged_settings_are_refused_or_overwritten(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match="Choose another folder"):
        check(tmp_path, SETTINGS, overwrite=False)
    claim(tmp_path, SETTINGS, overwrite=True)
    assert check(tmp_path, SETTINGS, overwrite=False)


def test_another_text_field_is_another_job(tmp_path):
    other = replace(SETTINGS, text_field="text")
    claim(tmp_path / "a", SETTINGS)
    claim(tmp_path / "b", other)
    for folder, settings in (("a", other), ("b", SETTINGS)):
        with pytest.raises(UserError, match="text_field "):
            check(tmp_path / folder, settings, overwrite=False)


def test_what_a_killed_run_left_half_written_does_no_harm(tmp_path):
    (tmp_path / ".settings.json.1.unfinished").touch()
    claim(tmp_path, SETTINGS)
    (tmp_path / ".output.jsonl.1.unfinished").touch()
    (tmp_path / ".mine.unfinished").touch()
    claim(tmp_path, SETTINGS)
    assert names(tmp_path) == {"settings.json", ".mine.unfinished"}
    claim(tmp_path, OTHER, overwrite=True)
    assert names(tmp_path) == {"settings.json", ".mine.unfinished"}
    clear(tmp_path)
    assert names(tmp_path) == {".mine.unfinished"}


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
