# SPDX-License-Identifier: Apache-2.0
"""Every program prints its help, and tells of a mistake in one line with exit status 2."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[3]
ONLY_STARTED_BY_OTHERS = ("benchmarks.prompts.measure",)
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


def call(program: str, arguments: list[str], monkeypatch) -> int:
    """The exit status of a program that ends with its command line."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main()
    return ended.value.code


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p not in ONLY_STARTED_BY_OTHERS])
def test_help_is_the_modules_docstring(program, monkeypatch, capsys):
    assert call(program, ["--help"], monkeypatch) == 0
    first_line = importlib.import_module(program).__doc__.splitlines()[0]
    assert first_line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("decode.compare", "--tiny --output {other}", "exists. Add --resume"),
        ("decode.compare", "--tiny --resume --output {other}", "is no result file of schema 1"),
        ("decode.compare", "--tiny --modes transformers", "needs --model"),
        ("decode.compare", "--tiny --batch-sizes 0", "'0' must be an integer of at least 1"),
        ("decode.compare", "--tiny --engine-args []", "'[]' must be a JSON object"),
        ("decode.compare", "--tiny --schedule [[1,2]]", "must be JSON such as [[1, 8, 4]"),
        ("decode.limits", "--preset 8b --draft-vocab {none}", "the file cannot be read"),
        ("decode.limits", "--preset 8b --dtype x", "--dtype=x must be one of float32"),
        ("decode.measure", "--mode plain --tiny --output {other}", "is no result file"),
        ("serve.bench", "--tiny --questions {none}", "there is no such file"),
        ("serve.bench", "--tiny --questions {other}", "other.json: this is no question"),
        ("prompts.held_out_functions", "many", "'many' must be an integer of at least 1"),
        ("prompts.word_problems", "0", "'0' must be an integer of at least 1"),
        ("pages.report", "{none}", "there is no such file"),
        ("pages.plots", "{other}", "is no result file"),
        ("pages.check_tuning", "{none} {none}", "Give a results folder of tune"),
        ("gpu.check_graphs", "--output x --model {none}", "no tokenizer could be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    program, arguments, message, tmp_path, monkeypatch, capsys
):
    other = tmp_path / "other.json"
    other.write_text('{"name": "x"}\n')
    arguments = arguments.format(none=tmp_path / "none", other=other)
    assert call(f"benchmarks.{program}", arguments.split(), monkeypatch) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert ": error: " in lines[-1]
