# SPDX-License-Identifier: Apache-2.0
"""Catch `make demo` that hides why its set-up failed, or shows all that pip writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "run_logged.py"


def run(log, body):
    command = [sys.executable, str(TOOL), str(log), "Setting up", sys.executable, "-c", body]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_phases_are_shown_and_the_rest_is_in_the_log(tmp_path):
    log = tmp_path / "new" / "demo.log"
    done = run(log, "print('+ pip install torch'); print('WARNING: much')")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.partition("] ")[2] for line in done.stdout.splitlines()]
    assert lines == ["Setting up", "  pip install torch", "done"]
    assert log.read_text() == "+ pip install torch\nWARNING: much\n"


def test_a_failure_shows_the_end_of_the_log_and_its_name(tmp_path):
    log = tmp_path / "demo.log"
    body = "import sys\nfor i in range(40): print('line', i)\nsys.exit('no room')"
    done = run(log, body)
    assert done.returncode == 1
    assert "line 5\n" not in done.stdout
    assert "line 39\nno room\n" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f"exit status 1. The whole log: {log}")
