# SPDX-License-Identifier: Apache-2.0
"""The script that users run first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def test_demo_shows_equal_tokens_and_a_real_acceptance_length():
    output = run("examples/demo.py", "--num-prompts", "2", "--max-tokens", "40")
    assert "2 of 2 answers have exactly plain vLLM's tokens." in output
    rows = re.findall(r"│ *yes │ *([0-9.]+) │[^│]*│ *([0-9]+) / ([0-9]+) │", output)
    assert len(rows) == 2
    for acceptance_length, reused, steps in rows:
        assert float(acceptance_length) > 1.2
        assert int(reused) == int(steps) > 0
