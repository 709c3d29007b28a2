# SPDX-License-Identifier: Apache-2.0
"""Catch output of an engine's processes that is lost or not shown, and an error not found in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from vllm_layerskip.host.process_output import kept_lines, last_error, output_kept

PREFIX = "(EngineCore pid=12) ERROR 11-27 17:59:22 [core.py:1101] "


def test_output_of_a_child_is_kept_and_shown(capfd):
    lines = kept_lines()
    child = "import sys; print('out'); print('err', file=sys.stderr)"
    command = [sys.executable, "-c", f"{child}; sys.exit(1)"]
    with pytest.raises(subprocess.CalledProcessError), output_kept(lines):
        subprocess.run(command, check=True)
    assert sorted(lines) == ["err", "out"]
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("out\nafter\n", "err\n")
    assert "after" not in lines


def test_a_child_that_outlives_the_block_is_shown_on(capfd):
    child = "import time; time.sleep(0.5); print('later', flush=True)"
    with output_kept(kept_lines()):
        process = subprocess.Popen([sys.executable, "-c", child])
    process.wait(timeout=30)
    for _ in range(100):
        if "later" in (shown := capfd.readouterr().out):
            return
        time.sleep(0.02)
    pytest.fail(f"{shown!r}")


def test_a_forked_child_keeps_no_pipe_open():
    """Else the copying threads would never end, and its own writes would block for ever."""
    with output_kept(kept_lines()):
        child = os.fork()
        if child == 0:
            pipes = [d for d in os.listdir("/proc/self/fd") if int(d) > 2 and _is_pipe(d)]
            os._exit(min(len(set(pipes) - BEFORE), 99))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _is_pipe(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:")
    except OSError:
        return False


BEFORE = {d for d in os.listdir("/proc/self/fd") if _is_pipe(d)}


def test_no_descriptor_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with output_kept(kept_lines()):
            pass
    for _ in range(100):
        if len(os.listdir("/proc/self/fd")) <= before:
            return
        time.sleep(0.02)
    pytest.fail("descriptors are open")


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("all is well\n", None),
        ("Traceback (most recent call last):\n  File x\nValueError: why\n", "ValueError: why"),
        (f"{PREFIX}ValueError: why\n", "ValueError: why"),
        ("[rank0]: ValueError: why\n", "ValueError: why"),
        ("generate: error: --model x\nbye", "generate: error: --model x"),
        (
            f"{PREFIX}EngineCore failed to start.\n{PREFIX}ValueError: No memory.\nTraceback:\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\nbye\n",
            "ValueError: No memory.",
        ),
        ("torch.OutOfMemoryError: CUDA\n", "torch.OutOfMemoryError: CUDA"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, too long. [type=value_error, input_value=1]\n    For further\n",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig "
            "Value error, too long.",
        ),
        (
            "x.ValidationError: 2 validation errors for Model\ndtype\n  Input should be 'auto'",
            "x.ValidationError: 2 validation errors for Model dtype Input should be 'auto'",
        ),
        ("RuntimeError: Engine core initialization failed. See root cause above.\n",
         "RuntimeError: Engine core initialization failed. See root cause above."),
    ],
)  # fmt: skip
def test_the_last_error(log, expected):
    assert last_error(log.splitlines()) == expected
