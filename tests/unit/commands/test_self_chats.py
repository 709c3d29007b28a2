# SPDX-License-Identifier: Apache-2.0
"""Catch an option of `self-chats` that gets lost, and a result that is not told."""

from __future__ import annotations

import pytest

from vllm_layerskip.batch import self_chats
from vllm_layerskip.batch.self_chats import Sampling, Summary
from vllm_layerskip.commands.main import main

SUMMARY = Summary(
    num_chats=3,
    num_unfinished=0,
    num_answer_tokens=90,
    num_questions=5,
    dropped={"empty questions": 2},
    num_tokens_of_this_run=120,
    seconds=4.0,
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """``make(*options, **changes of the summary)``: the settings that the library gets."""

    def make(*options, **changes):
        seen = []

        def library(settings):
            seen.append(settings)
            return Summary(**{**vars(SUMMARY), **changes})

        monkeypatch.setattr(self_chats, "self_chats", library)
        required = ["--model", "m", "--num-chats", "3", "--output", str(tmp_path / "c.jsonl")]
        assert main(["self-chats", *required, "--device", "cpu", *options]) == 0
        (settings,) = seen
        return settings

    return make


def test_options_reach_the_library(make, tmp_path):
    settings = make(
        "--temperature=0.9", "--top-p=0.8", "--max-question-tokens=7", "--max-answer-tokens=9",
        "--answer-temperature=0.1", "--system=Be brief.", "--seed=5", "--exclude", "a", "b",
        "--keep-unfinished", "--overwrite", "--max-minutes=1.5", "--max-num-seqs=2",
        "--tensor-parallel-size=2", "--dtype=bfloat16", "--max-model-len=99",
        '--engine-args={"enforce_eager": true}',
    )  # fmt: skip
    assert settings.sampling == Sampling(0.9, 0.8, 7, 9, 0.1, "Be brief.", 5)
    assert (settings.output, settings.num_chats) == (tmp_path / "c.jsonl", 3)
    assert (settings.exclude, settings.keep_unfinished, settings.overwrite) == (["a", "b"], 1, 1)
    assert settings.max_minutes == 1.5
    assert settings.engine.speculative_config() is None
    assert settings.engine.llm_arguments() == {
        "dtype": "bfloat16",
        "max_model_len": 99,
        "tensor_parallel_size": 2,
        "max_num_seqs": 2,
        "enforce_eager": True,
    }


def test_defaults(make):
    settings = make()
    assert settings.sampling == Sampling(1.0, 1.0, 256, 512, 0.0, None, 0)
    assert settings.engine.llm_arguments() == {"dtype": "float32"}
    assert settings.max_minutes is None


def test_what_is_printed(make, tmp_path, capsys):
    make()
    chats, questions, this_run, following = capsys.readouterr().out.splitlines()
    assert chats == f"3 chats, 90 tokens of answers: {tmp_path / 'c.jsonl'}"
    assert questions == "5 questions, dropped: 2 empty questions."
    assert this_run.endswith("120 tokens of questions and answers in 4.0 s, 30.0 tokens/s with "
                             "the engine's start.")  # fmt: skip
    assert "vllm-layerskip train --config" in following
    assert str(tmp_path / "c.jsonl") in following


def test_what_is_printed_of_less(make, capsys):
    make(num_unfinished=1, dropped={}, num_tokens_of_this_run=0, note="Only 3 of 9 chats.")
    chats, questions, this_run, note, _ = capsys.readouterr().out.splitlines()
    assert chats.startswith("3 chats (1 cut off), ")
    assert questions.endswith("dropped: none.")
    assert this_run == "All was there from earlier runs, and no engine was started."
    assert note == "Only 3 of 9 chats."
