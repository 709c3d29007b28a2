# SPDX-License-Identifier: Apache-2.0
"""Structured outputs: drafts that a grammar forbids are drafted, refused and leave no trace.

Without async scheduling vLLM cuts a request's drafts at the first forbidden one, so rows verify
different numbers of drafts; with it they are verified and never accepted. Catches exit states
or K/V of such drafts in use, and an embedding that reads the -1 that stands for such a draft
(docs/tests.md, T10, T11).
"""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from engines import RecordedInputs
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "imports": {
            "type": "array",
            "items": {"enum": ["os", "sys", "path", "import"]},
            "minItems": 1,
            "maxItems": 4,
        },
        "public": {"type": "boolean"},
    },
    "required": ["name", "imports", "public"],
    "additionalProperties": False,
}
REGEX = r"def [a-z_]{3,12}\(self\):\n    return [0-9]{1,6}"
CHOICES = ["import os", "import sys", "from os import path"]
GRAMMAR = r"""
root ::= import{2,5}
import ::= "import " [a-z]{2,8} "\n"
"""
LARK_GRAMMAR = r"""
start: import+
import: "import " NAME "\n"
NAME: /[a-z]{2,8}/
"""


def is_json(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def matches(pattern: str):
    return lambda text: re.fullmatch(pattern, text) is not None


CONSTRAINTS = {
    "json": ({"json": SCHEMA}, is_json),
    "regex": ({"regex": REGEX}, matches(REGEX)),
    "choice": ({"choice": CHOICES}, CHOICES.__contains__),
    "grammar": ({"grammar": GRAMMAR}, matches(r"(import [a-z]{2,8}\n){2,5}")),
}
BACKENDS = {
    "xgrammar": CONSTRAINTS,
    "guidance": {
        **CONSTRAINTS,
        # It can go on for ever; what comes until max_tokens must fit.
        "grammar": ({"grammar": LARK_GRAMMAR}, matches(r"(import [a-z]{2,8}\n)*(i|im.*)?")),
    },
}


def settings(backend="xgrammar", async_scheduling=False):
    return {
        "async_scheduling": async_scheduling,
        "structured_outputs_config": {"backend": backend, "disable_any_whitespace": True},
    }


def ask(engine, prompts, constraint, max_tokens=80):
    """Token ids and text of each answer."""
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        structured_outputs=StructuredOutputsParams(**constraint),
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.llm.generate(inputs, params, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), o.outputs[0].text) for o in outputs]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_fits_and_is_plain_vllms(pool, checkpoint, prompts, backend, async_scheduling):
    engine = pool.layerskip(checkpoint, 3, 5, **settings(backend, async_scheduling))
    plain = pool.get(checkpoint, **settings(backend))
    accepted, num_forbidden = {}, 0
    for name, (constraint, fits) in BACKENDS[backend].items():
        with engine.counting() as counts, RecordedInputs(engine) as inputs:
            answers = ask(engine, prompts, constraint)
        assert answers == ask(plain, prompts, constraint)
        assert all(fits(text) for _, text in answers)
        inputs.assert_token_ids()
        assert counts.num_accepted_tokens <= counts.num_draft_tokens
        accepted[name] = counts.num_accepted_tokens
        num_forbidden += 5 * counts.num_drafts - counts.num_draft_tokens
    assert num_forbidden > 0, "no draft was forbidden: nothing was tested"
    # For some grammars the backend allows no token that the checkpoint would draft.
    assert sum(accepted.values()) > 20, f"accepted drafts: {accepted}"


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_constrained_rows_share_batches_with_free_ones(pool, checkpoint, prompts, async_scheduling):
    """Rows with few drafts, with many, and prompts that come in between."""
    params = [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(
            temperature=0,
            max_tokens=60,
            structured_outputs=StructuredOutputsParams(regex=REGEX),
        ),
    ]
    batch, batch_params = 2 * prompts, 6 * params
    expected = pool.get(checkpoint, **settings()).generate(batch, batch_params)
    engine = pool.layerskip(checkpoint, 3, 5, **settings(async_scheduling=async_scheduling))
    with engine.counting() as counts, RecordedInputs(engine) as inputs:
        assert engine.generate(batch, batch_params) == expected
    counts.assert_speculated()
    inputs.assert_token_ids()
    assert counts.num_verify_steps_full > 0
    # Sync, unequal numbers of drafts take the ordinary forward; async, all rows have K.
    assert counts.num_verify_steps_reused > 0


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_constrained_requests_reach_the_models_last_position(
    pool, checkpoint, prompts, async_scheduling
):
    """Upstream's max_model_len test: the end is met in the middle of a structured output."""
    limits = {**settings(async_scheduling=async_scheduling), "max_model_len": 96}
    endless = {"regex": r"(import [a-z]{2,8}\n)*"}
    batch = [prompts[2][: 96 - 24 - residue] for residue in range(7)]
    engine = pool.layerskip(checkpoint, 3, 5, **limits)
    with engine.counting() as counts:
        answers = ask(engine, batch, endless, max_tokens=96)
    plain = pool.get(checkpoint, **settings(), max_model_len=96)
    assert answers == ask(plain, batch, endless, max_tokens=96)
    assert [len(p) + len(tokens) for p, (tokens, _) in zip(batch, answers, strict=True)] == [96] * 7
    counts.assert_speculated()


def test_sampled_outputs_fit(pool, checkpoint, prompts):
    """With temperature and probabilistic drafts, too."""
    engine = pool.layerskip(
        checkpoint, 3, 5, spec={"draft_sample_method": "probabilistic"}, **settings()
    )
    params = [
        SamplingParams(
            temperature=0.9,
            seed=seed,
            max_tokens=80,
            structured_outputs=StructuredOutputsParams(json=SCHEMA),
        )
        for seed in range(12)
    ]
    inputs = [{"prompt_token_ids": prompts[0]}] * len(params)
    with engine.counting() as counts:
        outputs = engine.llm.generate(inputs, params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert all(is_json(text) for text in texts)
    assert len(set(texts)) > 6
    counts.assert_speculated()
