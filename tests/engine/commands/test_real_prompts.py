# SPDX-License-Identifier: Apache-2.0
"""benchmarks.prompts.real_prompts on the embedded checkpoint: its processes and its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.prompts.records import load

ROOT = Path(__file__).parents[3]
CPU = ("--dtype", "float32", "--device", "cpu", "--enforce-eager")


def run_module(name: str, *arguments: object) -> str:
    command = [sys.executable, "-m", f"benchmarks.prompts.{name}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.getenv("PYTHONPATH", "")}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=580
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def run(checkpoint: Path, questions: Path, output: Path, *options: object) -> dict[str, list]:
    """Records by mode."""
    run_module(
        "real_prompts", "--model", checkpoint, "--questions", questions, "--output", output,
        *CPU, *options,
    )  # fmt: skip
    by_mode: dict[str, list] = {}
    for record in load(output):
        by_mode.setdefault(record["mode"], []).append(record)
    return by_mode


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "functions.jsonl"
    path.write_text(run_module("held_out_functions", 4))
    return path


def outputs(record):
    return {answer["key"]: answer["output"] for answer in record["answers"]}


def assert_drafted_and_exact(record, plain):
    assert outputs(record) == outputs(plain)
    assert record["num_draft_tokens"] > 0
    assert sum(record["num_accepted_at"]) == sum(
        answer["num_accepted_tokens"] for answer in record["answers"]
    )
    for answer in record["answers"]:
        assert answer["same_in_every_run"]
        # A step yields its accepted drafts and one token more; the last one's surplus is cut.
        num_tokens = 1 + answer["num_steps"] + answer["num_accepted_tokens"]
        surplus = num_tokens - answer["num_tokens"]
        assert 0 <= surplus <= record["settings"]["num_speculative_tokens"]


def test_two_turns_and_functions_one_at_a_time(checkpoint, functions, tmp_path):
    chat = {"question_id": 7, "category": "chat", "turns": ["def add(a, b):\n", "def sub(a, b):\n"]}
    too_long = {"question_id": 8, "category": "long", "turns": ["x = 1\n" * 400]}
    with functions.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in (chat, too_long))
    output = tmp_path / "answers.json"
    records = run(checkpoint, functions, output, "--max-tokens", 16, "--repeats", 2)
    (plain,), (ours,) = records["plain"], records["layerskip"]
    keys = [answer["key"] for answer in ours["answers"]]
    assert keys[-2:] == ["7#0", "7#1"]
    assert len(keys) == 6
    assert ours["num_prompt_tokens"] == plain["num_prompt_tokens"]
    assert ours["questions"]["too_long"] == {"long": 1}
    assert_drafted_and_exact(ours, plain)
    by_category: dict[str, list] = {}
    for answer in ours["answers"]:
        by_category.setdefault(answer["category"], []).append(answer)
    accepted = {c: sum(a["num_accepted_tokens"] for a in of) for c, of in by_category.items()}
    assert len(accepted) == 5
    assert min(accepted.values()) > 0
    assert plain["num_draft_tokens"] == 0
    assert plain["num_accepted_at"] == []
    for answer in plain["answers"]:
        assert answer["num_accepted_tokens"] == 0
        assert answer["num_steps"] == answer["num_tokens"] - 1
        assert all(
            t < total for t, total in zip(answer["tpot_ms"], answer["total_ms"], strict=True)
        )
    for record in (plain, ours):
        assert len(record["runs_tokens_per_s"]) == 2
        assert record["provenance"]["versions"]["vllm-layerskip"]


@pytest.mark.slow
def test_every_mode_four_at_once(checkpoint, functions, tmp_path):
    modes = ("plain", "layerskip", "layerskip-no-reuse", "draft-model", "ngram")
    options = ("--batch-size", 4, "--max-tokens", 32, "--repeats", 1, "--pairs", "3:5", "9:3")
    records = run(checkpoint, functions, tmp_path / "all.json", *options, "--modes", *modes)
    assert {mode: len(of_mode) for mode, of_mode in records.items()} == dict.fromkeys(modes, 2) | {
        "plain": 1
    }
    (plain,) = records["plain"]
    for mode in modes[1:4]:
        for record in records[mode]:
            assert_drafted_and_exact(record, plain)
    # The same layers draft the same, in a model of their own or not, with reuse or without.
    for ours, *others in zip(*(records[mode] for mode in modes[1:4]), strict=True):
        for other in others:
            for a, b in zip(ours["answers"], other["answers"], strict=True):
                assert a["num_accepted_tokens"] == b["num_accepted_tokens"]
    for record in records["ngram"]:
        assert outputs(record) == outputs(plain)
        assert sum(answer["num_accepted_tokens"] for answer in record["answers"]) > 0


@pytest.mark.slow
def test_drafts_as_data(checkpoint, functions, tmp_path):
    every = {"exit_layer": "all", "num_speculative_tokens": 4, "draft_quantization": "int4"}
    early = {"exit_layer": 3, "num_speculative_tokens": 4}
    named = (f"{name}={json.dumps(config)}" for name, config in (("all", every), ("3", early)))
    options = ("--max-tokens", 16, "--repeats", 1, "--modes", "plain", "layerskip", "draft-model")
    records = run(checkpoint, functions, tmp_path / "o.json", *options, "--drafts", *named)
    (plain,), (all_layers, first), (model,) = (
        records[mode] for mode in ("plain", "layerskip", "draft-model")
    )
    for record in (all_layers, first, model):
        assert_drafted_and_exact(record, plain)
    assert all_layers["drafts"]["config"]["exit_layer"] == "all"
    assert first["num_accepted_at"] == model["num_accepted_at"]


@pytest.mark.slow
def test_past_the_end_sampled_and_with_a_chat_template(checkpoint, functions, tmp_path):
    fixed = ("--max-tokens", 32, "--repeats", 1, "--chat")
    for options in (("--ignore-eos",), ("--temperature", 0.8, "--seed", 3)):
        records = run(checkpoint, functions, tmp_path / f"{options[0]}.json", *fixed, *options)
        (ours,) = records["layerskip"]
        assert sum(answer["num_accepted_tokens"] for answer in ours["answers"]) > 0
        if options[0] == "--ignore-eos":
            assert {answer["num_tokens"] for answer in ours["answers"]} == {32}
            assert_drafted_and_exact(ours, records["plain"][0])
