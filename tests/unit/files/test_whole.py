# SPDX-License-Identifier: Apache-2.0
"""A file or folder is its old self or complete, whatever happens while it is written."""

import json
import os
import subprocess
import sys

import pytest

from vllm_layerskip.files.whole import replace_folder, whole_file, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "config.json"
    write_text(path, "old")
    path.chmod(0o640)
    write_json(path, {"exit_layer": 3})
    assert json.loads(path.read_text()) == {"exit_layer": 3}
    assert path.read_text().endswith("}\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize("content", ["old", None], ids=["replaced", "new"])
def test_an_error_leaves_what_was_there(tmp_path, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UnicodeEncodeError), whole_file(path) as draft:
        draft.write_text("half \ud83d", encoding="utf-8")
    assert names(tmp_path) == ([] if content is None else ["file"])
    assert content is None or path.read_text() == content


def test_what_cannot_be_json_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, object())
    assert path.read_text() == "1\n"


def test_a_process_that_dies_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from vllm_layerskip.files.whole import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as draft:\n"
        "    draft.write_text('half'); os._exit(1)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, path], check=False, timeout=60)
    assert process.returncode == 1
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE, text=True) as reader:
        write_text(path, "through")
        assert reader.communicate(timeout=60)[0] == "through"
    assert path.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    for name, content in (("new", "2"), ("model", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(content)
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "2"


def test_what_a_crash_between_the_two_steps_leaves_goes_with_the_next_call(tmp_path, monkeypatch):
    for name, content in (("new", "2"), ("model", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(content)
    real, steps = os.replace, []

    def crash(*paths):
        steps.append(paths)
        if len(steps) == 2:
            raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(tmp_path / "new", tmp_path / "model")
    assert names(tmp_path) == [".unfinished-model-outdated", "new"]
    assert (tmp_path / ".unfinished-model-outdated" / "weights").read_text() == "1"
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "none", tmp_path / "model")
    assert names(tmp_path) == [".unfinished-model-outdated", "new"]  # Nothing is in its place yet.
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "2"


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "file", "x")
    assert not os.path.exists(tmp_path / "none")
