# SPDX-License-Identifier: Apache-2.0
"""`vllm-layerskip generate`: answers are plain vLLM's, on one engine or many, and after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

import pytest
from checkpoints import EMBEDDED

MAX_TOKENS = 20
EXIT_LAYER, NUM_DRAFTS = 6, 2
"""Not the checkpoint's, which are 3 and 5."""
FLAGS = [
    "--model", str(EMBEDDED), "--max-tokens", str(MAX_TOKENS), "--token-ids", "--ignore-eos",
    "--engine-args", json.dumps({
        "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8,
        "kv_cache_memory_bytes": 16 << 20,
    }),
]  # fmt: skip
TOO_LONG = list(range(3, 300))
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
}  # fmt: skip


def _command(folder: Path, *options: str) -> list[str]:
    arguments = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out"), *options]
    return [sys.executable, "-m", "vllm_layerskip.commands.main", "generate", *FLAGS, *arguments]


def _generate(folder: Path, *options: str) -> str:
    process = subprocess.run(
        _command(folder, *options), env=ENVIRONMENT, text=True, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-6000:]
    return process.stdout


def _write_input(path: Path, prompts, repeat: int = 1) -> None:
    records = [
        {"prompt_token_ids": ids, "id": f"p{i}-{copy}"}
        for copy in range(repeat)
        for i, ids in enumerate(prompts)
    ]
    records.insert(1, {"prompt_token_ids": TOO_LONG, "id": "too long"})
    records.insert(2, {"prompt": "", "id": "empty"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _check(folder: Path, expected: list[list[int]], repeat: int = 1) -> None:
    lines = (folder / "out" / "output.jsonl").read_text().splitlines()
    outputs = [json.loads(line) for line in lines]
    ids = [f"p{i}-{copy}" for copy in range(repeat) for i in range(len(expected))]
    assert [o["id"] for o in outputs] == [ids[0], "too long", "empty", *ids[1:]]
    by_id = {o["id"]: o for o in outputs}
    assert "256" in by_id["too long"]["error"]
    assert "a text that is not empty" in by_id["empty"]["error"]
    for name in ids:
        assert by_id[name]["error"] is None
        assert by_id[name]["token_ids"] == expected[int(name[1])], name
        assert by_id[name]["finish_reason"] == "length"


@pytest.fixture(scope="module")
def expected(pool, prompts):
    """Plain vLLM's."""
    return pool.get(EMBEDDED).greedy(prompts, MAX_TOKENS)


def test_one_engine(tmp_path, prompts, expected):
    _write_input(tmp_path / "in.jsonl", prompts)
    assert "8 rows, of which 2 with an error" in _generate(tmp_path)
    _check(tmp_path, expected)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["acceptance_length"] > 1.5
    assert summary["num_output_tokens"] == len(prompts) * MAX_TOKENS


ODD = {
    "half a character": {"prompt": "a \ud83d"},
    "half a character in a chat": {"messages": [{"role": "user", "content": "\ud83d"}]},
    "out of the vocabulary": {"prompt_token_ids": [3, 10**6]},
    "just out of the vocabulary": {"prompt_token_ids": [3, 1024]},
    "more than 64 bits": {"prompt_token_ids": [2**64]},
    "a picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]},
    "an end out of the vocabulary": {
        "prompt": "a", "sampling_params": {"stop_token_ids": [1024], "min_tokens": 2}
    },
    "more ends than a worker holds": {
        "prompt": "a", "sampling_params": {"stop_token_ids": [*range(3, 200)], "min_tokens": 2}
    },
    "no end": {"prompt": "a", "sampling_params": {"max_tokens": 2**31 - 1}},
    "as hot as the sun": {"prompt": "a", "sampling_params": {"temperature": 1e300}},
}  # fmt: skip
UNUSUAL = {
    "control characters": {"prompt": "\0\u2028\uffff"},
    "limits of the parameters": {
        "prompt": "a", "sampling_params": {
            "max_tokens": 4, "min_tokens": 4, "top_k": 2**31 - 1, "top_p": 1e-9, "stop": "\n",
            "temperature": 1e-300, "repetition_penalty": 1e6, "presence_penalty": -2,
            "frequency_penalty": 2, "seed": -(2**63), "stop_token_ids": list(range(3, 103)),
        },
    },
    "no penalty": {"prompt": "a", "sampling_params": {"repetition_penalty": 1e-9}},
    "nearly no end": {"prompt": "a", "sampling_params": {"max_tokens": 10**9}},
    "OpenAI's": {"body": {"prompt": "a", "max_completion_tokens": 3, "max_tokens": None}},
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--num-replicas", "2"], marks=pytest.mark.slow)], ids=str
)
def test_odd_rows_end_in_errors_and_cost_the_others_nothing(tmp_path, prompts, expected, options):
    if options:
        pytest.importorskip("ray.data.llm")
    rows = [{"id": name, **row} for name, row in (ODD | UNUSUAL).items()]
    good = [{"prompt_token_ids": ids} for ids in prompts]
    lines = [json.dumps(row) for pair in zip_longest(rows, good) for row in pair if row]
    (tmp_path / "in.jsonl").write_text("\n".join(["{", *lines]) + "\n")
    log = _generate(tmp_path, *options)
    outputs = [json.loads(line) for line in (tmp_path / "out" / "output.jsonl").open()]
    by_id = {o["id"]: o for o in outputs}
    assert [name for name in (*ODD, "row-0") if not by_id[name]["error"]] == []
    assert [by_id[name]["error"] for name in UNUSUAL] == [None] * len(UNUSUAL), log[-3000:]
    assert [o["token_ids"] for o in outputs if o["id"] not in ODD | UNUSUAL][1:] == expected
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert options or summary["acceptance_length"] > 1


def test_a_finished_job_is_written_in_another_form_without_an_engine(tmp_path, prompts, expected):
    parquet = pytest.importorskip("pyarrow.parquet")
    _write_input(tmp_path / "in.jsonl", prompts)
    _generate(tmp_path)
    log = _generate(tmp_path, "--output-format", "parquet")
    assert "No row was left to answer, and no engine was started." in log
    rows = parquet.read_table(tmp_path / "out" / "output.parquet").to_pylist()
    assert [row["token_ids"] for row in rows if not row["error"]] == expected


def test_a_start_that_fails_leaves_no_folder(tmp_path, prompts):
    _write_input(tmp_path / "in.jsonl", prompts)
    process = subprocess.run(
        _command(tmp_path, "--exit-layer", "99"), env=ENVIRONMENT, timeout=300, check=False,
        capture_output=True,
    )  # fmt: skip
    assert process.returncode
    assert not (tmp_path / "out").exists()


def test_exit_layer_and_number_of_drafts_of_the_command_line(tmp_path, prompts, expected):
    _write_input(tmp_path / "in.jsonl", prompts)
    options = ["--exit-layer", str(EXIT_LAYER), "--num-speculative-tokens", str(NUM_DRAFTS)]
    _generate(tmp_path, *options)
    _check(tmp_path, expected)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["speculative_config"] == {
        "method": "layerskip",
        "exit_layer": EXIT_LAYER,
        "num_speculative_tokens": NUM_DRAFTS,
    }
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    # Some drafts are accepted, and never more than were asked for.
    assert 1.5 < summary["acceptance_length"] <= 1 + NUM_DRAFTS


def _wait_for_answers(folder: Path, process: subprocess.Popen, number: int) -> None:
    partial, deadline = folder / "out" / "answers.partial.jsonl", time.monotonic() + 240
    while not partial.exists() or partial.read_bytes().count(b"\n") < number:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_job_goes_on(tmp_path, prompts, expected):
    repeat = 12
    _write_input(tmp_path / "in.jsonl", prompts, repeat)
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        _command(tmp_path), env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
    )
    # Two of them have an error, at once.
    _wait_for_answers(tmp_path, process, 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output = _generate(tmp_path)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 < summary["num_rows_of_this_run"] <= repeat * len(prompts) + 2 - 10, output
    _check(tmp_path, expected, repeat)
    assert "is there already, and whole" in _generate(tmp_path)


@pytest.mark.slow
def test_two_replicas(tmp_path, prompts, expected):
    pytest.importorskip("ray.data.llm")
    _write_input(tmp_path / "in.jsonl", prompts, 2)
    _generate(tmp_path, "--num-replicas", "2", "--rows-per-task", "3")
    _check(tmp_path, expected, 2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["engine", "actor"])
def test_a_replica_that_is_killed_loses_and_doubles_nothing(tmp_path, prompts, expected, victim):
    pytest.importorskip("ray.data.llm")
    repeat = 20
    _write_input(tmp_path / "in.jsonl", prompts, repeat)
    before = set(_victims(victim))
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        _command(tmp_path, "--num-replicas", "2", "--rows-per-task", "4"),
        env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    _wait_for_answers(tmp_path, process, 10)
    victims = set(_victims(victim)) - before
    assert victims
    os.kill(min(victims), signal.SIGKILL)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-6000:]
    _check(tmp_path, expected, repeat)


def _victims(kind: str) -> list[int]:
    """Processes of replicas on this machine: vLLM's engine cores, or Ray Data's actors."""
    name = "EngineCore" if kind == "engine" else "ray::MapWorker"
    found = []
    for line in subprocess.check_output(["ps", "-eo", "pid,args"], text=True).splitlines()[1:]:
        pid, _, title = line.strip().partition(" ")
        if name in title and "defunct" not in title:
            found.append(int(pid))
    return found
