# SPDX-License-Identifier: Apache-2.0
"""`vllm-layerskip self-chats`: a real engine asks, and answers as `generate` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import chatting

from vllm_layerskip.commands.main import main

NUM_CHATS, MAX_ANSWER_TOKENS = 12, 24
ENGINE = [
    "--device", "cpu", "--max-model-len", "256",
    "--engine-args", json.dumps({
        "enforce_eager": True, "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20,
    }),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chatting(tmp_path_factory.mktemp("models") / "chatting")


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Path:
    """A file of chats."""
    folder = tmp_path_factory.mktemp("made")
    assert make(model, folder / "chats.jsonl") == 0
    return folder / "chats.jsonl"


def make(model: Path, output: Path, *options: str, num_chats: int = NUM_CHATS) -> int:
    limits = ["--max-question-tokens", "32", "--max-answer-tokens", str(MAX_ANSWER_TOKENS)]
    where = ["--model", str(model), "--output", str(output), "--num-chats", str(num_chats)]
    return main(["self-chats", *where, *limits, *ENGINE, *options])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions_of(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in rows_of(path)]


def test_chats_are_whole_and_their_questions_differ(made):
    rows = rows_of(made)
    assert len(rows) == NUM_CHATS
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
        question, answer = (message["content"] for message in row["messages"])
        assert row["text"] == f"<s>{question}</s>{answer}</s>"
        assert row["finish_reason"] == "stop"
    assert len(set(questions_of(made))) == NUM_CHATS


def test_answers_are_those_of_plain_greedy_generate(model, made, tmp_path):
    rows = rows_of(made)
    asked = [{"messages": row["messages"][:1]} for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    options = ["--no-speculation", "--max-tokens", str(MAX_ANSWER_TOKENS)]
    assert main(["generate", "--model", str(model), *paths, *options, *ENGINE]) == 0
    answers = rows_of(tmp_path / "out" / "output.jsonl")
    assert [answer["text"] for answer in answers] == [row["messages"][1]["content"] for row in rows]
    assert {answer["finish_reason"] for answer in answers} == {"stop"}


def test_the_seed_decides(model, made, tmp_path):
    other, same = tmp_path / "other.jsonl", tmp_path / "same.jsonl"
    assert make(model, other, "--seed", "1", num_chats=4) == 0
    assert make(model, same, num_chats=4) == 0
    assert questions_of(same) == questions_of(made)[:4] != questions_of(other)


def test_a_held_out_part_of_what_is_there_needs_no_engine(model, made, tmp_path, capsys):
    held_out, rest = tmp_path / "held_out.jsonl", tmp_path / "rest.jsonl"
    shutil.copytree(f"{made}.run", f"{held_out}.run")
    shutil.copytree(f"{made}.run", f"{rest}.run")
    assert make(model, held_out, num_chats=4) == 0
    assert make(model, rest, "--exclude", str(held_out), num_chats=NUM_CHATS - 4) == 0
    assert capsys.readouterr().out.count("no engine was started") == 2
    assert rows_of(held_out) + rows_of(rest) == rows_of(made)


def test_a_model_that_never_ends_its_questions(model, tmp_path, capsys):
    output = tmp_path / "none.jsonl"
    assert make(model, output, "--max-question-tokens", "1", "--top-p", "0.01", num_chats=2) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"vllm-layerskip self-chats: error: --model {model}: none of 100 quest")
    assert not output.exists()
