# SPDX-License-Identifier: Apache-2.0
"""The benchmark tool on a CPU, as it runs on a GPU: the same commands, processes and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ("--device", "cpu", "--tiny")


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.getenv("PYTHONPATH", "")}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=580
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process


def load_records(path: Path) -> list[dict]:
    records = json.loads(path.read_text())["records"]
    assert {record["status"] for record in records} == {"ok"}, records
    return records


def of_mode(records: list[dict], mode: str) -> list[dict]:
    return [record for record in records if record["mode"] == mode]


def test_a_table_its_report_and_resuming_it(tmp_path):
    output = tmp_path / "tiny.json"
    table = (*CPU, "--modes", "plain", "layerskip", "--output", output)
    process = run_script("compare.py", *table)
    records = load_records(output)
    assert [(record["mode"], record["batch_size"]) for record in records] == [
        ("plain", 1), ("plain", 2), ("layerskip", 1), ("layerskip", 2)
    ]  # fmt: skip
    for record in of_mode(records, "layerskip"):
        drafts = record["speculation"]
        assert drafts["acceptance_length"] == pytest.approx(3.0, abs=0.25)
        assert drafts["num_verify_steps_reused"] > 0
        assert record["engine"]["memory"]["exit_state_bytes"] == 2 * 4 * 2 * 64 * 4
    for record in records:
        (run,) = record["runs"]
        tokens_per_step = 3 if record["mode"] == "layerskip" else 1
        expected = tokens_per_step * record["batch_size"] * run["num_steps"]
        assert run["num_tokens"] == pytest.approx(expected, rel=0.25)
        assert record["provenance"]["versions"]["vllm-layerskip"]
        assert "--modes plain layerskip" in record["provenance"]["command"]
    assert "x plain" in process.stdout
    assert "| 16 | 2 | layerskip | E=2 K=4 |" in run_script("report.py", output).stdout

    before = output.read_bytes()
    run_script("compare.py", *table, "--resume")
    assert output.read_bytes() == before


@pytest.mark.slow
def test_the_peers_and_reuse_off(tmp_path):
    output = tmp_path / "tiny.json"
    modes = ("layerskip-no-reuse", "draft-model", "ngram", "early-exit")
    run_script("compare.py", *CPU, "--modes", *modes, "--output", output)
    records = load_records(output)
    assert [record["mode"] for record in records] == [mode for mode in modes for _ in range(2)]
    for record in of_mode(records, "layerskip-no-reuse"):
        assert record["speculation"]["num_verify_steps_reused"] == 0
        assert record["speculation"]["num_accepted_tokens"] > 0
    for record in of_mode(records, "draft-model"):
        assert record["speculation"]["acceptance_length"] == pytest.approx(3.0, abs=0.25)
    assert all(record["speculation"]["num_drafts"] for record in of_mode(records, "ngram"))
    rooms = {record["mode"]: record["engine"]["kv_capacity_tokens"] for record in records}
    # Of 8 layers: a second model's 2 need room of their own, 2 alone need a quarter.
    assert rooms["draft-model"] < rooms["ngram"] == rooms["layerskip-no-reuse"]
    assert rooms["early-exit"] == 4 * rooms["ngram"]


@pytest.mark.slow
def test_a_schedule_that_falls_to_no_drafts(tmp_path):
    output = tmp_path / "tiny.json"
    schedule = ("--schedule", "[[1, 1, 4], [2, 2, 0]]")
    run_script("compare.py", *CPU, "--modes", "layerskip", *schedule, "--output", output)
    one, two = load_records(output)
    assert one["speculation"]["num_drafts"] > 0
    assert two["speculation"]["num_drafts"] == 0


@pytest.mark.slow
def test_a_checkpoint_against_transformers(checkpoint, tmp_path):
    output = tmp_path / "checkpoint.json"
    modes = ("transformers", "transformers-assistant", "plain", "layerskip", "draft-model")
    load = ("--batch-sizes", 1, "--output-len", 64, "--prompt-lens", 32)
    run_script(
        "compare.py", *CPU, *load, "--model", checkpoint, "--modes", *modes, "--output", output
    )
    records = {record["mode"]: record for record in load_records(output)}
    assert set(records) == set(modes)
    lengths = {
        mode: record["speculation"]["acceptance_length"]
        for mode, record in records.items()
        if record["speculation"]
    }
    # Greedy drafts of the same layers on the same prompt: the same are accepted.
    assert lengths["layerskip"] == pytest.approx(lengths["draft-model"], abs=0.05)
    assert lengths["layerskip"] == pytest.approx(lengths["transformers-assistant"], abs=0.5)
    assert lengths["layerskip"] > 1.3


@pytest.mark.slow
def test_serving_under_load(checkpoint, tmp_path):
    pytest.importorskip("pandas", reason="vllm bench serve reads its questions with pandas")
    questions = tmp_path / "question.jsonl"
    texts = ("import os\n\n\ndef main():\n", "class Queue:\n    def put(self, item):\n", "x = [\n")
    lines = (json.dumps({"category": "coding", "turns": [text]}) for text in texts)
    questions.write_text("\n".join(lines))
    output = tmp_path / "serve.json"
    load = ("--concurrency", 1, 2, "--min-requests", 2, "--requests-per-slot", 1)
    run_script(
        "serve_bench.py", *CPU, *load, "--model", checkpoint, "--max-prompt-tokens", 64,
        "--questions", questions, "--modes", "layerskip", "--output", output,
    )  # fmt: skip
    records = load_records(output)
    assert [record["concurrency"] for record in records] == [1, 2]
    for record in records:
        assert record["result"]["completed"] == 2
        assert record["result"]["median_tpot_ms"] > 0
        assert record["result"]["spec_decode_acceptance_length"] > 1.3
    assert "TTFT ms" in run_script("report.py", output).stdout


@pytest.mark.slow
def test_training_a_model_within_its_time(tmp_path):
    model, output = tmp_path / "model", tmp_path / "trained.json"
    run_script(
        "train_model.py", "--size", "tiny", "--minutes", 1.2, "--corpus-mb", 1, "--packages",
        "--output", model,
    )  # fmt: skip
    scores = json.loads((model / "scores.json").read_text())
    assert scores["num_steps"] >= 1
    assert scores["log"][-1]["train_loss"] < 6.5, "no better than uniform over 512 tokens"
    run_script("compare.py", *CPU, "--model", model, "--modes", "layerskip", "--output", output)
    assert all(record["speculation"]["num_drafts"] for record in load_records(output))
