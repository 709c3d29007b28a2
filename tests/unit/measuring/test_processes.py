# SPDX-License-Identifier: Apache-2.0
"""Catch a process that outlives its block, with what it started, or a log without its end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_layerskip.measuring.processes import log_tail, logged_process


def test_a_process_has_its_variables_and_its_output_is_in_the_log(tmp_path):
    log = tmp_path / "new" / "process.log"
    code = "import os, sys; print(os.environ['HERE']); print('oops', file=sys.stderr); sys.exit(3)"
    with logged_process([sys.executable, "-c", code], log, {"HERE": "value"}) as process:
        assert process.wait(timeout=30) == 3
    assert sorted(log.read_text().split()) == ["oops", "value"]


def test_the_end_of_a_long_log_is_shown(tmp_path):
    log = tmp_path / "process.log"
    log.write_bytes(b"begin\xff" + b"x" * 100_000 + b"end")
    assert log_tail(log).endswith("xend")
    assert len(log_tail(log)) < 10_000


@pytest.mark.parametrize("ignores", [False, True])
def test_what_a_process_started_ends_with_it(tmp_path, ignores):
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if ignores else ""
    child = f"{ignore} import time; print('ready', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "process.log"
    with logged_process([sys.executable, "-c", code], log, patience_s=0.5) as process:
        for _ in range(200):
            if "ready" in log.read_text():
                break
            time.sleep(0.05)
    assert process.poll() is not None
    for _ in range(40):
        if not _session_lives(process.pid):
            return
        time.sleep(0.05)
    pytest.fail("a process of the session still runs")


def test_sigterm_ends_what_was_started(tmp_path):
    """As where a shell or a job's manager ends a benchmark: its engine must not run on."""
    log = tmp_path / "process.log"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from vllm_layerskip.measuring.processes import logged_process\n"
        f"with logged_process([sys.executable, '-c', {child!r}], Path({str(log)!r})):\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            for _ in range(400):
                if log.exists() and log.read_text().endswith("\n"):
                    break
                time.sleep(0.05)
            leader = int(log.read_text())
            assert _session_lives(leader)
            process.terminate()
            assert process.wait(timeout=30) == 128 + signal.SIGTERM
            assert not _session_lives(leader)
        finally:
            process.kill()


def test_a_second_sigterm_does_not_interrupt_the_first_ones_work(tmp_path):
    code = (
        "import os, signal\n"
        "from vllm_layerskip.measuring.processes import exit_on_sigterm\n"
        "with exit_on_sigterm():\n"
        "    try:\n"
        "        with exit_on_sigterm(): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); print('cleaned up')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert process.stdout == "cleaned up\n"


def _session_lives(leader: int) -> bool:
    """Whether a process of the group runs; one that nobody has waited for yet does not."""
    return any(group == leader and state != "Z" for state, group in _processes())


def _processes() -> Iterator[tuple[str, int]]:
    """State and group of every process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            yield state, int(group)
