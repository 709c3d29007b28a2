# SPDX-License-Identifier: Apache-2.0
"""Every way of scheduling x every sampling parameter gives plain vLLM's tokens.

Catches drafts that survive a preemption, a parameter that is applied to the wrong position of
a verify step, and a scheduler that runs ahead of the tokens (docs/tests.md, T3, T4, T10, T12, T14).
One request of each parameter, all in one engine, so that rows of every kind share batches.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
from engines import SpecCounts
from features import (
    ADD_TO_THE_OUTPUT,
    FEATURES,
    MAX_TOKENS,
    PROPERTY,
    REGEX,
    SAMPLED,
    sampling_params,
)
from vllm import RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt

EXIT_LAYER, NUM_SPECULATIVE_TOKENS = 3, 4
BLOCK_SIZE = 32
SCHEDULING: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "chunked prefill": {"max_num_batched_tokens": 48},
    "preemption": {"num_gpu_blocks_override": 13},
    "chunked prefill and preemption": {
        "max_num_batched_tokens": 48,
        "num_gpu_blocks_override": 13,
    },
}
SETTINGS = {
    "block_size": BLOCK_SIZE,
    "enable_prefix_caching": False,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


@dataclass
class Answers:
    requests: dict[str, RequestOutput]
    counts: SpecCounts

    def tokens(self, feature: str) -> list[int]:
        return list(self.requests[feature].outputs[0].token_ids)


def ask(engine, prompts) -> Answers:
    inputs = [
        TokensPrompt(prompt_token_ids=prompts[index % len(prompts)])
        for index in range(len(FEATURES))
    ]
    with engine.counting() as counts:
        outputs = engine.llm.generate(
            inputs, [sampling_params(feature) for feature in FEATURES], use_tqdm=False
        )
    # vLLM numbers the requests of an engine; here they are named by what they ask for.
    names = dict(zip((output.request_id for output in outputs), FEATURES, strict=True))
    counts.request_ids = [f"{names[owner.rsplit('-', 1)[0]]}-" for owner in counts.request_ids]
    return Answers(dict(zip(FEATURES, outputs, strict=True)), counts)


@pytest.fixture(scope="module")
def prompts_of_the_matrix(prompts):
    """Long ones too, so that prefills are cut and K/V runs out."""
    return [prompts[index] for index in (0, 5, 3)]


@pytest.fixture(scope="module")
def plain(pool, checkpoint, prompts_of_the_matrix):
    return ask(pool.get(checkpoint, **SETTINGS), prompts_of_the_matrix)


@pytest.fixture(scope="module")
def plain_without(pool, checkpoint, prompts_of_the_matrix):
    """Tokens of each request's prompt with no parameter set."""
    tokens = pool.get(checkpoint, **SETTINGS).generate(
        [prompts_of_the_matrix[index % 3] for index in range(len(FEATURES))],
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
    )
    return dict(zip(FEATURES, tokens, strict=True))


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def async_scheduling(request):
    return request.param


@pytest.fixture(scope="module", params=SCHEDULING)
def answers(request, pool, checkpoint, prompts_of_the_matrix, async_scheduling):
    engine = pool.layerskip(
        checkpoint,
        EXIT_LAYER,
        NUM_SPECULATIVE_TOKENS,
        spec={"draft_sample_method": "probabilistic"},
        async_scheduling=async_scheduling,
        **SETTINGS,
        **SCHEDULING[request.param],
    )
    assert engine.vllm_config.scheduler_config.async_scheduling is async_scheduling
    answers = ask(engine, prompts_of_the_matrix)
    counts = answers.counts
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    assert (counts.num_preemptions > 0) == ("num_gpu_blocks_override" in SCHEDULING[request.param])
    return answers


@pytest.mark.parametrize("feature", FEATURES)
def test_tokens_are_plain_vllms(answers, plain, plain_without, feature):
    drafts = answers.counts.of_request(feature)
    assert sum(drafted for drafted, _ in drafts) > 0, "nothing was drafted for it"
    if feature in SAMPLED:
        assert len(answers.tokens(feature)) == MAX_TOKENS
        assert answers.tokens(feature) != plain_without[feature]
        return
    assert answers.tokens(feature) == plain.tokens(feature)
    output, expected = answers.requests[feature].outputs[0], plain.requests[feature].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (
        expected.text,
        expected.finish_reason,
        expected.stop_reason,
    )
    if feature not in ADD_TO_THE_OUTPUT:
        assert answers.tokens(feature) != plain_without[feature], "the parameter changed nothing"


@pytest.mark.parametrize("feature", [*ADD_TO_THE_OUTPUT, "repetition_penalty", "json"])
def test_drafts_are_accepted(answers, feature):
    assert sum(accepted for _, accepted in answers.counts.of_request(feature)) > 0


def test_structured_outputs_parse(answers):
    assert re.fullmatch(REGEX, answers.requests["regex"].outputs[0].text)
    parsed = json.loads(answers.requests["json"].outputs[0].text)
    assert parsed[PROPERTY] in ("default", "is")
    assert isinstance(parsed["string"], bool)


def test_logprobs_are_plain_vllms(answers, plain):
    output = answers.requests["logprobs"].outputs[0]
    assert len(output.logprobs) == len(output.token_ids)
    assert_same_logprobs(output.logprobs, plain.requests["logprobs"].outputs[0].logprobs)
    prompt_logprobs = answers.requests["prompt_logprobs"].prompt_logprobs
    expected = plain.requests["prompt_logprobs"].prompt_logprobs
    assert prompt_logprobs[0] is expected[0] is None
    assert_same_logprobs(prompt_logprobs[1:], expected[1:])


def assert_same_logprobs(actual, expected):
    for step, expected_step in zip(actual, expected, strict=True):
        assert {token: entry.rank for token, entry in step.items()} == {
            token: entry.rank for token, entry in expected_step.items()
        }
        assert {token: entry.logprob for token, entry in step.items()} == pytest.approx(
            {token: entry.logprob for token, entry in expected_step.items()}, abs=1e-4
        )


@pytest.fixture(scope="module")
def sampled_tokens():
    """Sampled tokens of the first way of scheduling, for the others to equal."""
    return {}


@pytest.mark.parametrize("feature", SAMPLED)
def test_seeded_tokens_do_not_depend_on_the_batch(answers, sampled_tokens, feature):
    if answers.counts.num_preemptions:
        pytest.skip("a resumed request drafts from other positions, so it draws other tokens")
    assert sampled_tokens.setdefault(feature, answers.tokens(feature)) == answers.tokens(feature)
