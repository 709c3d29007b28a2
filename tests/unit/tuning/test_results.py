# SPDX-License-Identifier: Apache-2.0
"""Catch a committed choice of `tune` that its committed full sweep does not bear out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_layerskip.tuning.cells import PLAIN, load_rows, num_equal_outputs

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted(path.parent for path in (ROOT / "docs" / "tuning").glob("*/choice"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_choice_is_within_10_percent_of_the_sweeps_best(example):
    command = [sys.executable, "-m", "benchmarks.pages.check_tuning"]
    process = subprocess.run(
        [*command, str(example / "choice"), str(example / "sweep")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_in_float32_every_measured_cell_wrote_what_plain_decoding_wrote(example):
    for folder in (example / "choice", example / "sweep"):
        report = json.loads((folder / "report.json").read_text())
        assert report["settings"]["engine"]["dtype"] == "float32"
        (digest,) = {row["settings"] for row in report["measured"]}
        rows = [row for row in load_rows(folder / "cells.csv") if row.settings == digest]
        plain = {row.batch_size: row for row in rows if row.cell == PLAIN}
        assert len(rows) > len(plain) > 0
        for row in rows:
            equal, num_prompts = num_equal_outputs(row, plain[row.batch_size])
            assert equal == num_prompts > 0
