# SPDX-License-Identifier: Apache-2.0
"""Catch a recorded command that would not run again when it is typed, or that shows whose machine
it ran on."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_layerskip.measuring import provenance
from vllm_layerskip.measuring.provenance import command_line

ROOT = Path(__file__).parents[3]
PRINT_IT = "from vllm_layerskip.measuring.provenance import command_line\nprint(command_line())\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Programs that print their command line."""
    package = tmp_path / "jobs"
    package.mkdir()
    (package / "__init__.py").touch()
    for path in (
        tmp_path / "script.py", package / "measure.py", package / "__main__.py",
        tmp_path / "vllm-layerskip",
    ):  # fmt: skip
        path.write_text(PRINT_IT)
    return tmp_path


def printed(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return process.stdout.strip()


@pytest.mark.parametrize(
    "command",
    [
        "python script.py --repeats 3",
        "python script.py",
        "python -m jobs.measure --modes 'a b' --runs 2",
        "python -m jobs --runs 2",
    ],
)
def test_a_command_is_recorded_as_it_was_typed(folder, command):
    assert printed(folder, *shlex.split(command)[1:]) == command


def test_the_console_script_is_named_without_its_folder(folder):
    """pip installs it as a file without a suffix, which the shell runs by its whole path."""
    arguments = [str(folder / "vllm-layerskip"), "tune", "--model", "m"]
    assert printed(folder, *arguments) == "vllm-layerskip tune --model m"


def test_folders_of_this_machine_do_not_show(folder):
    arguments = ["script.py", "--model", "/home/somebody/model", "--results", "here/r"]
    assert printed(folder, *arguments) == "python script.py --model model --results here/r"


def test_paths_in_the_repository_are_relative_to_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    arguments = [f"{ROOT}/tools/check.py", "--file", f"{ROOT}/docs/tuning.md"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command_line() == "python tools/check.py --file docs/tuning.md"


def test_one_process_of_many_records_what_the_user_typed(monkeypatch):
    monkeypatch.setenv(provenance.COMMAND_VARIABLE, "python -m benchmarks.decode.compare")
    assert provenance.provenance()["command"] == "python -m benchmarks.decode.compare"
