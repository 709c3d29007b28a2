# SPDX-License-Identifier: Apache-2.0
"""Catch a committed choice of `tune` that its committed full sweep does not bear out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_layerskip.tuning.cells import load_measurements, num_equal_outputs
from vllm_layerskip.tuning.costs import MeasuredStep, design_cells, fit_costs
from vllm_layerskip.tuning.grid import PLAIN

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
        in_file = load_measurements(folder / "cells.csv")
        measured = [found for found in in_file if found.settings_digest == digest]
        plain = {found.batch_size: found for found in measured if found.cell == PLAIN}
        assert len(measured) > len(plain) > 0
        for found in measured:
            equal, num_prompts = num_equal_outputs(found, plain[found.batch_size])
            assert equal == num_prompts > 0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize("run", ["choice", "sweep"])
def test_costs_are_fitted_again_as_they_were(example, run):
    report = json.loads((example / run / "report.json").read_text())
    grid, steps = report["grid"], {}
    for row in report["measured"]:
        key = (row["exit_layer"], row["num_speculative_tokens"], row["batch_size"])
        steps[key] = row["step_ms"] / 1e3
    design = design_cells(grid["exit_layers"], grid["num_speculative_tokens"])
    measured = [MeasuredStep(*cell, b, steps[*cell, b]) for cell in design
                for b in grid["batch_sizes"]]  # fmt: skip
    costs = fit_costs(measured, {b: steps[*PLAIN, b] for b in grid["batch_sizes"]})
    assert len(report["costs"]) == len(grid["batch_sizes"])
    for batch_size, kept in report["costs"].items():
        again = vars(costs.by_batch_size[int(batch_size)])
        assert again == pytest.approx(kept, rel=1e-6)
