# SPDX-License-Identifier: Apache-2.0
"""Tuning on real engines: one cell's measurement, and the command from prompts to `auto`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.tuning.cells import load_measurements, num_equal_outputs
from vllm_layerskip.tuning.drafts import OWN, Draft
from vllm_layerskip.tuning.grid import PLAIN, PLAIN_DECODING, DraftCell
from vllm_layerskip.tuning.jobs import CellJob, EngineSettings, Workload
from vllm_layerskip.tuning.measure import batch_groups, generate, measure_cells

ROOT = Path(__file__).parents[3]
CELL = DraftCell(OWN, (3, 4))
TWIN = DraftCell(Draft("int4"), (12, 4))


def test_a_cell_is_measured_as_it_was_predicted(checkpoint: Path, prompts: list[list[int]]) -> None:
    """Plain decoding, one cell, and a twin of all layers, in this process: outputs, counters, and
    acceptance."""
    from checkpoints import load_reference

    from vllm_layerskip.evaluation.agreement import Agreement
    from vllm_layerskip.evaluation.predictions import measure_agreement
    from vllm_layerskip.evaluation.twin import make_twin
    from vllm_layerskip.tuning.twin_agreement import measure_twin_agreement

    engine = EngineSettings(
        model=str(checkpoint),
        dtype="float32",
        device="cpu",
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
        engine_args={"max_num_batched_tokens": 256},
    )
    load = Workload(
        prompts=tuple(map(tuple, prompts[:4])),
        max_tokens=80,
        stop_token_ids=(1,),
        batch_sizes=(1, 3),
        repeats=1,
    )
    job = CellJob((PLAIN_DECODING, CELL, TWIN), engine, load, "digest")
    assert CellJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    rows = {(row.draft_cell, row.batch_size): row for row in measure_cells(job)}
    assert list(rows) == [(cell, size) for cell in job.cells for size in (1, 3)]
    for cell, batch_size in list(rows)[2:]:
        plain, row = rows[PLAIN_DECODING, batch_size], rows[cell, batch_size]
        assert num_equal_outputs(row, plain) == (4, 4)
        assert plain.acceptance_length == 1.0
        assert (plain.num_drafts, plain.num_accepted_tokens) == (0, 0)
        assert row.num_accepted_tokens > 0
        assert row.acceptance_length > 1.3
        for measured in (plain, row):
            tokens_per_step = measured.batch_size * measured.acceptance_length
            by_step = 1e3 * tokens_per_step / measured.step_ms
            assert measured.tokens_per_s == pytest.approx(by_step, rel=1e-3)

    continuations = generate(engine, load)
    assert all(len(ids) == 80 or ids[-1] == 1 for ids in continuations)
    reference = load_reference(checkpoint)
    agreement = measure_agreement(reference, load.prompts, continuations, [3])
    assert agreement.target_agreement == 1.0
    predicted = agreement.acceptance_lengths(4)[0, 3]
    # The same text, but for where its last, incomplete step begins.
    assert rows[CELL, 1].acceptance_length == pytest.approx(predicted, rel=0.08)
    make_twin(reference, "int4", None)
    matches = measure_twin_agreement(reference, load.prompts, continuations, (12,))
    predicted = Agreement((12,), matches, 1.0).acceptance_lengths(4)[0, 3]
    # The engine's drafts attend to the target's K/V, so they may be better.
    assert predicted * 0.92 < rows[TWIN, 1].acceptance_length < 5
    assert rows[TWIN, 1].acceptance_length > rows[CELL, 1].acceptance_length


def test_every_group_is_full_and_every_prompt_in_one() -> None:
    prompts = [(1,), (2,), (3,), (4,), (5,)]
    assert batch_groups(prompts, 2) == [[(1,), (2,)], [(3,), (4,)], [(5,), (1,)]]
    assert batch_groups(prompts[:1], 3) == [[(1,), (1,), (1,)]]


def run_tune(*arguments: object) -> str:
    command: Sequence[str] = [
        sys.executable, "-m", "vllm_layerskip.commands.main", "tune", *map(str, arguments)
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.getenv("PYTHONPATH", "")}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=580
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


@pytest.mark.slow
def test_from_prompts_to_auto(
    checkpoint: Path, prompts: list[list[int]], tokenizer, tmp_path: Path
) -> None:
    """The command as users run it; then again, with everything there."""
    model, results = tmp_path / "model", tmp_path / "results"
    shutil.copytree(checkpoint, model)
    file = tmp_path / "prompts.jsonl"
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
    file.write_text("\n".join(map(json.dumps, texts)))
    command = (
        "--model", model, "--prompts", file, "--batch-sizes", "1,2", "--max-tokens", 48,
        "--num-speculative-tokens", "1-5", "--exit-layers", "2-6", "--repeats", 1,
        "--num-measured", 1, "--enforce-eager", "--cells-per-process", 9, "--results", results,
    )  # fmt: skip
    shown = run_tune(*command)
    report = json.loads((results / "report.json").read_text())
    rows = load_measurements(results / "cells.csv")
    measured = {row.cell for row in rows}
    assert PLAIN in measured
    assert {(2, 1), (2, 5), (6, 1), (6, 5), (4, 3)} < measured
    assert len(measured) == 7
    for row in rows:
        if row.cell != PLAIN:
            assert row.num_accepted_tokens > 0
            (plain,) = (r for r in rows if (r.cell, r.batch_size) == (PLAIN, row.batch_size))
            assert num_equal_outputs(row, plain) == (len(prompts), len(prompts))
            lengths = report["agreement"]["acceptance_lengths"][str(row.exit_layer)]
            if row.batch_size == 1:
                predicted = lengths[row.num_speculative_tokens - 1]
                assert row.acceptance_length == pytest.approx(predicted, rel=0.1)
    block = json.loads((model / "config.json").read_text())["layerskip"]
    options = resolve_options({"model": "[self]"}, 12, block)
    assert options.exit_layer == report["choice"]["exit_layer"]
    assert f"vllm serve {model}" in shown

    before = (results / "cells.csv").read_bytes()
    (results / "map.png").unlink()
    run_tune(*command)
    assert (results / "cells.csv").read_bytes() == before
    assert (results / "map.png").exists()


@pytest.mark.slow
def test_a_model_without_a_block_drafts_with_all_its_layers(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Twins alone, through the processes that the command starts."""
    model, results, file = tmp_path / "model", tmp_path / "results", tmp_path / "prompts.txt"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    del config["layerskip"]
    (model / "config.json").write_text(json.dumps(config))
    file.write_text("def main():\nimport os\n")
    run_tune(
        "--model", model, "--prompts", file, "--max-tokens", 24, "--exit-layers", "all",
        "--draft-quantization", "int4", "fp8", "--num-speculative-tokens", "2", "--repeats", 1,
        "--num-measured", 0, "--enforce-eager", "--cells-per-process", 9, "--results", results,
    )  # fmt: skip
    rows = {row.draft.quantization: row for row in load_measurements(results / "cells.csv")}
    assert set(rows) == {"none", "int4", "fp8"}
    assert rows["none"].cell == PLAIN
    for kind in ("int4", "fp8"):
        assert rows[kind].cell == (12, 2)
        assert rows[kind].num_accepted_tokens > 0
        assert num_equal_outputs(rows[kind], rows["none"]) == (2, 2)
    block = json.loads((model / "config.json").read_text())["layerskip"]
    options = resolve_options({"model": "[self]"}, 12, block)
    assert options.exit_layer == 12
    assert options.draft_quantization in ("int4", "fp8")


@pytest.mark.slow
def test_on_a_ray_cluster(checkpoint: Path, tmp_path: Path) -> None:
    """Ray tasks on this machine, cut off by a lost row, then gone on with."""
    pytest.importorskip("ray")
    file, results = tmp_path / "prompts.jsonl", tmp_path / "results"
    file.write_text('"def main():"\n"import os"\n')
    command = (
        "--model", checkpoint, "--prompts", file, "--max-tokens", 24, "--dry-run", "--ray",
        "--num-speculative-tokens", "1-2", "--exit-layers", "6", "--repeats", 1,
        "--draft-quantization", "none", "int4", "--num-measured", 0, "--enforce-eager",
        "--cells-per-process", 3, "--results", results,
    )  # fmt: skip
    run_tune(*command)
    rows = load_measurements(results / "cells.csv")
    (plain,) = (row for row in rows if row.cell == PLAIN)
    cells = {DraftCell(draft, (6, k)) for draft in (OWN, Draft("int4")) for k in (1, 2)}
    assert {row.draft_cell for row in rows} == {PLAIN_DECODING, *cells}
    for row in rows:
        if row.cell != PLAIN:
            assert row.num_accepted_tokens > 0
            assert num_equal_outputs(row, plain) == (2, 2)
    lines = (results / "cells.csv").read_text().splitlines(keepends=True)
    (results / "cells.csv").write_text("".join(lines[:-1]))
    run_tune(*command)
    again = load_measurements(results / "cells.csv")
    # The others were not measured again.
    assert again[:-1] == rows[:-1]
    assert again[-1].draft_cell == rows[-1].draft_cell
    assert again[-1].outputs == rows[-1].outputs
