# SPDX-License-Identifier: Apache-2.0
"""Catch rows that wait forever or are forgotten when the engine refuses others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from unit.batch.batch_jobs import DEFAULTS
from vllm_layerskip.batch import one_engine
from vllm_layerskip.batch.rows import PromptRow
from vllm_layerskip.batch.settings import JobSettings

MAX_NUM_SEQS = 2


class Engine:
    """Answers all its requests in one step, the newest first; it refuses the prompt "long"."""

    def __init__(self):
        scheduler = SimpleNamespace(max_num_seqs=MAX_NUM_SEQS)
        self.vllm_config = SimpleNamespace(scheduler_config=scheduler)
        self.engine_core = self
        self.pending = []
        self.most_pending = 0

    def add_request(self, request_id, prompt, params):
        if prompt["prompt"] == "long":
            raise ValueError("the prompt is too long")
        self.pending.insert(0, request_id)
        self.most_pending = max(self.most_pending, len(self.pending))

    def step(self):
        done, self.pending = self.pending, []
        completion = SimpleNamespace(text="a", token_ids=[1], finish_reason="stop")
        return [
            SimpleNamespace(
                finished=True, request_id=name, prompt_token_ids=[1], outputs=[completion]
            )
            for name in done
        ]

    def shutdown(self):
        self.vllm_config = None


@pytest.fixture
def engine(monkeypatch):
    engine = Engine()
    monkeypatch.setattr("vllm.LLM", lambda **arguments: SimpleNamespace(llm_engine=engine))
    return engine


def _answers(*prompts):
    rows = [PromptRow(i, i, prompt=p, sampling_params=DEFAULTS) for i, p in enumerate(prompts)]
    return list(one_engine.answers(rows, JobSettings("m", None, {}, DEFAULTS)))


@pytest.mark.parametrize("num_refused", [0, 1, 2 * MAX_NUM_SEQS, 9])
@pytest.mark.parametrize("num_good", [0, 1, 9])
def test_each_row_has_one_answer_however_many_are_refused_first(engine, num_refused, num_good):
    answers = _answers(*["long"] * num_refused, *["good"] * num_good)
    assert sorted(answer.index for answer in answers) == list(range(num_refused + num_good))
    assert all((answer.index < num_refused) == bool(answer.error) for answer in answers)
    assert engine.vllm_config is None


def test_no_more_rows_wait_in_the_engine_than_it_needs(engine):
    assert len(_answers(*["good"] * 9)) == 9
    assert engine.most_pending == 2 * MAX_NUM_SEQS
