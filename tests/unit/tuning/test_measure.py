# SPDX-License-Identifier: Apache-2.0
"""Catch a measurement that counts other tokens, steps or outputs than its engine's.

The engine is replaced where its steps are recorded; real ones run in
tests/engine/commands/test_tune.py.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.timing import Step
from vllm_layerskip.metrics import counters
from vllm_layerskip.tuning import measure
from vllm_layerskip.tuning.cells import output_digest
from vllm_layerskip.tuning.drafts import OWN, Draft
from vllm_layerskip.tuning.grid import PLAIN_DECODING, DraftCell
from vllm_layerskip.tuning.jobs import AgreementJob, CellJob, EngineSettings, Workload

ENGINE = EngineSettings(
    "m", draft_vocab="ids.json", draft_adapters={"abc": "folder"},
    engine_args={"tensor_parallel_size": 2},
)  # fmt: skip
WORKLOAD = Workload(((1, 2), (3,), (4,)), 16, (7,), (1, 2), repeats=3)
CELL = DraftCell(OWN, (3, 2))
TWIN = DraftCell(Draft("int4", "abc"), (4, 2))
JOB = CellJob((PLAIN_DECODING, CELL, TWIN), ENGINE, WORKLOAD, "digest")
EXITS = ((OWN, (2, 3)), (TWIN.draft, (4,)))


@pytest.fixture
def runs(monkeypatch):
    """What ``run_steps`` was asked for; its steps yield 2 tokens a request in 0.5 s."""
    asked = []

    def run_steps(llm, prompts, max_tokens, stop_token_ids=(), outputs=None):
        asked.append((len(prompts), max_tokens))
        if outputs is not None:
            outputs += [[prompt[0]] * 3 for prompt in prompts]
        tokens = {str(index): 2 for index in range(len(prompts))}
        return [Step(0.5 * n, tokens, has_finished=n == 6) for n in range(7)]

    counts = iter([SimpleNamespace(num_drafts=d, num_accepted_tokens=a) for d, a in
                   ((10, 4), (40, 19))])  # fmt: skip
    monkeypatch.setattr(measure, "run_steps", run_steps)
    monkeypatch.setattr(counters, "read_counters", lambda llm: next(counts))
    return asked


def test_a_measurement_says_what_its_engine_did(runs):
    found = measure.measure_batch_size(None, TWIN, 2, JOB, start_s=1.234)
    # A warm-up of the first group, then both groups three times.
    assert runs == [(2, 12)] + [(2, 16)] * 6
    assert (found.settings_digest, found.draft_cell, found.batch_size) == ("digest", TWIN, 2)
    assert found.tokens_per_s == 8.0
    assert found.runs_tokens_per_s == "8.00 8.00 8.00"
    assert found.step_ms == 500.0
    assert found.acceptance_length == 2.0
    assert found.num_steps == 10
    assert (found.num_drafts, found.num_accepted_tokens) == (30, 15)
    assert found.outputs.split() == [output_digest([first] * 3) for first in (1, 3, 4)]
    assert found.start_s == 1.23


def test_plain_decoding_has_no_counters(runs):
    found = measure.measure_batch_size(None, PLAIN_DECODING, 1, JOB, start_s=0)
    assert (found.num_drafts, found.num_accepted_tokens) == (0, 0)


def test_answers_that_are_too_short_are_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(measure, "run_steps", lambda *_: [Step(0.0, {"0": 1}, True)])
    with pytest.raises(UserError, match=r"batch size 1 .* Raise --max-tokens"):
        measure.measure_batch_size(None, PLAIN_DECODING, 1, JOB, start_s=0)


def test_an_engine_gets_the_cell_and_the_users_arguments_last():
    arguments = measure.engine_arguments(ENGINE, CELL, 8)
    # A checkpoint that names a twin is measured without it, too.
    assert arguments["speculative_config"] == {
        "method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 2,
        "draft_quantization": "none", "draft_adapter": "none", "draft_vocab": "ids.json",
    }  # fmt: skip
    assert measure.engine_arguments(ENGINE, TWIN, 8)["speculative_config"] == {
        "method": "layerskip", "exit_layer": 4, "num_speculative_tokens": 2,
        "draft_quantization": "int4", "draft_adapter": "folder", "draft_vocab": "ids.json",
    }  # fmt: skip
    assert (arguments["max_num_seqs"], arguments["tensor_parallel_size"]) == (8, 2)
    assert measure.engine_arguments(ENGINE, PLAIN_DECODING, 8)["speculative_config"] is None
    stated = EngineSettings("m", engine_args={"seed": 3})
    assert measure.engine_arguments(stated, PLAIN_DECODING, 8)["seed"] == 3


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        AgreementJob(ENGINE, WORKLOAD, "digest", EXITS, None, "vllm"),
        AgreementJob(ENGINE, WORKLOAD, "digest", EXITS, (5, 6), "transformers"),
    ],
    ids=lambda job: type(job).__name__,
)
def test_jobs_cross_as_json(job):
    assert type(job).from_dict(json.loads(json.dumps(job.to_dict()))) == job


def test_a_job_is_split_into_processes():
    cells = tuple(DraftCell(OWN, (e, 1)) for e in range(5))
    job = CellJob(cells, ENGINE, WORKLOAD, "digest")
    assert [part.cells for part in job.parts(2)] == [cells[:2], cells[2:4], cells[4:]]
