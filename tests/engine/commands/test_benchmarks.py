# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on a CPU, with the commands, processes and files of a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CPU = ("--device", "cpu", "--tiny")
NOTE = "A sentence on the setting."


def run_module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
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


@pytest.fixture(scope="module")
def tiny_table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[object, ...]]:
    """A table of four modes and two batch sizes, and the arguments that made it."""
    output = tmp_path_factory.mktemp("table") / "tiny.json"
    modes = ("plain", "layerskip", "draft-model", "layerskip-no-reuse")
    load = ("--preset", "tiny", "--batch-sizes", 1, 2, "--note", NOTE)
    table = (*CPU, *load, "--modes", *modes)
    run_module("decode.compare", "--output", output, *table)
    return output, table


def test_a_table_its_report_and_resuming_it(tiny_table):
    output, table = tiny_table
    records = load_records(output)
    assert [(record["mode"], record["batch_size"]) for record in records] == [
        (mode, size) for mode in table[table.index("--modes") + 1 :] for size in (1, 2)
    ]
    for record in of_mode(records, "layerskip"):
        drafts = record["speculation"]
        assert drafts["acceptance_length"] == pytest.approx(3.0, abs=0.25)
        assert drafts["num_verify_steps_reused"] > 0
        assert record["engine"]["memory"]["exit_state_bytes"] == 2 * 4 * 2 * 64 * 4
    for record in of_mode(records, "layerskip-no-reuse"):
        assert record["speculation"]["num_verify_steps_reused"] == 0
        assert record["speculation"]["num_accepted_tokens"] > 0
    for record in of_mode(records, "draft-model"):
        assert record["speculation"]["acceptance_length"] == pytest.approx(3.0, abs=0.25)
    for record in records:
        (run,) = record["runs"]
        tokens_per_step = 1 if record["mode"] == "plain" else 3
        expected = tokens_per_step * record["batch_size"] * run["num_steps"]
        assert run["num_tokens"] == pytest.approx(expected, rel=0.25)
        assert record["provenance"]["versions"]["vllm-layerskip"]
        command = record["provenance"]["command"]
        assert command.startswith("python -m benchmarks.decode.compare --output ")
    report = run_module("pages.report", output).stdout
    assert "| 16 | 2 | layerskip | E=2 K=4 |" in report
    assert NOTE in report

    before = output.read_bytes()
    process = run_module("decode.compare", *table, "--output", output, "--resume")
    assert output.read_bytes() == before
    assert "x plain" in process.stdout


def test_modes_that_take_turns(tmp_path):
    """Three engines alive at once, one of them with a twin, and each cell in both rounds."""
    output = tmp_path / "tiny.json"
    table = (*CPU, "--modes", "plain", "layerskip", "--drafts", "2:4", "2:4:int8")
    process = run_module("decode.compare", *table, "--interleave", 2, "--output", output)
    records = load_records(output)
    assert [(r["batch_size"], r["settings"]["round"], r["mode"]) for r in records] == [
        (size, number, mode)
        for size in (1, 2)
        for number in (1, 2)
        for mode in ("plain", "layerskip", "layerskip")
    ]
    for record in of_mode(records, "layerskip"):
        is_twin = record["settings"]["draft_quantization"] == "int8"
        assert record["speculation"]["num_accepted_tokens"] > 0
        assert (record["speculation"]["num_verify_steps_reused"] > 0) is not is_twin
    assert len(re.findall(r"layerskip │ E=2 K=4( int8)? +│", process.stdout)) == 4
    report = run_module("pages.report", output).stdout
    assert "medians over 2 rounds A B A B with engines that stay alive and take turns" in report


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_first_session_brings_every_number(tmp_path):
    """``gpu_session.sh --tiny first``: what it delivers and what it prints."""
    environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(tmp_path / "results")}
    # As on a GPU, the programs decide whether engines get processes of their own.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    process = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), "--tiny", "first"],
        capture_output=True, text=True, check=False, timeout=1500,
        env=environment | {"OUT": str(tmp_path / "out")},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    out, printed = tmp_path / "out", process.stdout
    outcomes = json.loads((out / "session.json").read_text())["outcomes"]
    assert [outcome["name"] for outcome in outcomes] == [
        "gpu", "exact", "demo", "7b", "7b-peers", "8b"
    ]  # fmt: skip
    assert len(list(out.iterdir())) <= 8, "the device tool returns no more files"

    (exact,) = json.loads((out / "exact.json").read_text())["checks"]
    assert exact["num_equal"] == exact["num_answers"] == 8
    assert exact["num_accepted"] > 0
    assert exact["num_reused"] > exact["num_full"]

    # The demo's table: equal tokens, a real acceptance length, every step reused.
    assert "2 of 2 answers have exactly plain vLLM's tokens (float32)." in printed
    rows = re.findall(r"│ *yes │ *([0-9.]+) │[^│]*│ *([0-9]+) / ([0-9]+) │", printed)
    assert len(rows) == 2
    for acceptance_length, reused, steps in rows:
        assert float(acceptance_length) > 1.2
        assert int(reused) == int(steps) > 0

    for record in of_mode(load_records(out / "first-8b.json"), "layerskip"):
        one_request = record["batch_size"] == 1
        assert (record["speculation"]["num_drafts"] > 0) == one_request, "K = 0 at batch 2"
        assert "torch.compile and JIT warm-up are off" in record["note"]
    summary = (out / "summary.md").read_text()
    assert printed.endswith(summary + "\n")
    assert "8 of 8 answers equal plain decoding's in float32" in summary
    assert summary.count("| layerskip |") == 4
    assert "Parts: gpu ok; exact ok; demo ok; 7b ok; 7b-peers ok; 8b ok." in summary


@pytest.mark.slow
def test_peers_and_the_room_that_they_leave(tiny_table, tmp_path):
    output = tmp_path / "tiny.json"
    shutil.copy(tiny_table[0], output)
    modes = ("ngram", "early-exit")
    run_module("decode.compare", *CPU, "--modes", *modes, "--output", output, "--resume")
    records = load_records(output)
    assert all(record["speculation"]["num_drafts"] for record in of_mode(records, "ngram"))
    rooms = {record["mode"]: record["engine"]["kv_capacity_tokens"] for record in records}
    # Of 8 layers: a second model's 2 need room of their own, 2 alone need a quarter.
    assert rooms["draft-model"] < rooms["ngram"] == rooms["layerskip-no-reuse"]
    assert rooms["early-exit"] == 4 * rooms["ngram"]


@pytest.mark.slow
def test_a_checkpoint_against_transformers(checkpoint, tmp_path):
    output = tmp_path / "checkpoint.json"
    modes = ("transformers", "transformers-assistant", "layerskip", "draft-model")
    load = ("--batch-sizes", 1, "--output-len", 64, "--prompt-lens", 32)
    run_module(
        "decode.compare", *CPU, *load, "--model", checkpoint, "--modes", *modes, "--output", output
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
    run_module(
        "serve.bench", *CPU, *load, "--model", checkpoint, "--max-prompt-tokens", 64,
        "--questions", questions, "--modes", "layerskip", "--output", output,
    )  # fmt: skip
    records = load_records(output)
    assert [record["concurrency"] for record in records] == [1, 2]
    for record in records:
        assert record["result"]["completed"] == 2
        assert record["result"]["median_tpot_ms"] > 0
        assert record["result"]["spec_decode_acceptance_length"] > 1.3
    assert "TTFT ms" in run_module("pages.report", output).stdout


@pytest.mark.slow
def test_training_a_model_within_its_time(tmp_path):
    model, output = tmp_path / "model", tmp_path / "trained.json"
    run_module(
        "decode.train_model", "--size", "tiny", "--minutes", 1.2, "--corpus-mb", 1, "--packages",
        "--output", model,
    )  # fmt: skip
    scores = json.loads((model / "scores.json").read_text())
    assert scores["num_steps"] >= 1
    assert json.loads((model / "generation_config.json").read_text())["use_cache"] is True
    assert scores["log"][-1]["train_loss"] < 6.5, "no better than uniform over 512 tokens"
    run_module("decode.compare", *CPU, "--model", model, "--modes", "layerskip", "--output", output)
    assert all(record["speculation"]["num_drafts"] for record in load_records(output))
