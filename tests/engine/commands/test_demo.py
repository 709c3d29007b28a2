# SPDX-License-Identifier: Apache-2.0
"""`make demo`: on the real model, and where the package index does not give it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from example_folder import find_example

ROOT = Path(__file__).parents[3]
ROW = re.compile(r"│ (\S+) +│ +(yes|NO) │ +([0-9.]+) │")
"""Question, tokens equal, acceptance length."""


def run_demo(tmp_path: Path, **environment: str) -> str:
    command = ["examples/demo.py", "--num-prompts", "2", "--max-tokens", "16"]
    process = subprocess.run(
        [sys.executable, *command, "--log", str(tmp_path / "demo.log")],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    return process.stdout


def assert_equal_and_accepted(shown: str, num_questions: int) -> list[str]:
    """The names of the questions."""
    rows = ROW.findall(shown)
    assert len(rows) == num_questions, shown
    for _, equal, acceptance_length in rows:
        assert equal == "yes"
        assert float(acceptance_length) > 1
    assert f"{num_questions} of {num_questions} answers have exactly plain vLLM's tokens" in shown
    return [name for name, _, _ in rows]


def test_on_the_real_model(tmp_path):
    example = find_example()
    shown = run_demo(tmp_path)
    assert assert_equal_and_accepted(shown, 2) == ["knowledge", "explanation"]
    assert f"vllm serve {example} --speculative-model '[self]'" in shown
    assert "cannot be had" not in shown


def test_without_the_package_index(tmp_path):
    """It says so, and the embedded checkpoint stands in."""
    shown = run_demo(
        tmp_path,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_NO_INDEX="1",
    )
    said = re.search(r"The example model cannot be had: (.*)", shown)
    assert said is not None, shown
    assert "pip could not fetch" in said[1]
    assert "The embedded checkpoint of 3 million parameters stands in." in shown
    assert_equal_and_accepted(shown, 2)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
