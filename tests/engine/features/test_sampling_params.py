# SPDX-License-Identifier: Apache-2.0
"""Every field of ``SamplingParams`` that docs/features.md says works gives plain vLLM's answer.

Catches a field that only vLLM's non-speculative sampler reads, and a row of the page without a
test. All requests run together, so that each must leave the others' rows alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sampling_fields import fields_that
from vllm import SamplingParams
from vllm.config import ReasoningConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    StructuredOutputsParams,
)

MAX_TOKENS = 32
PROMPT_LEN = 33
IDS = [5, 20, 30]
# The prompt has the first, so that there is thinking to cut short.
START, END = " of", "\n"

VALUES: dict[str, dict[str, Any]] = {
    "n": {"n": 2, "temperature": 0.7, "top_k": 1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "temperature": {"temperature": 0.7, "top_k": 1},
    "watermarking": {"watermarking": True},
    "top_p": {"temperature": 0.7, "top_p": 1e-6},
    "top_k": {"temperature": 0.7, "top_k": 1},
    "seed": {"temperature": 0.7, "top_k": 1, "seed": 11},
    "stop": {"stop": ["the", "self", "in"]},
    "stop_token_ids": {"stop_token_ids": [28, 618]},
    "ignore_eos": {"ignore_eos": True},
    "max_tokens": {"max_tokens": 7},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": list(range(260, 360))},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "prompt_logprob_token_ids": {"prompt_logprob_token_ids": [IDS] * (PROMPT_LEN - 1)},
    "prompt_logprob_start": {
        "prompt_logprob_token_ids": [IDS] * (PROMPT_LEN - 3),
        "prompt_logprob_start": 2,
    },
    "logprob_token_ids": {"logprob_token_ids": IDS},
    "flat_logprobs": {"logprobs": 2, "prompt_logprobs": 1, "flat_logprobs": True},
    "detokenize": {"detokenize": False},
    "skip_special_tokens": {"skip_special_tokens": False},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "include_stop_str_in_output": {"stop": ["the"], "include_stop_str_in_output": True},
    "output_kind": {"output_kind": RequestOutputKind.FINAL_ONLY},
    "stream_interval": {"stream_interval": 3},
    "skip_clone": {"skip_clone": True},
    "structured_outputs": {
        "structured_outputs": StructuredOutputsParams(regex=r"def [a-z_]{3,12}\(self\):")
    },
    "allowed_token_ids": {"allowed_token_ids": list(range(20, 200))},
    "extra_args": {"extra_args": {"name": 1}},
    "bad_words": {"bad_words": [" the", " of", ".", ":", "?"]},
    "skip_reading_prefix_cache": {"skip_reading_prefix_cache": True},
    "thinking_token_budget": {"thinking_token_budget": 3},
    "repetition_detection": {
        "max_tokens": 64,
        "repetition_detection": RepetitionDetectionParams(max_pattern_size=16, min_count=2),
    },
}
MORE: dict[str, dict[str, Any]] = {
    "none": {},
    "every logprob": {"logprobs": -1, "prompt_logprobs": -1},
    "no logprob but the token's": {"logprobs": 0},
    "logprob_token_ids with logprobs": {"logprobs": 3, "logprob_token_ids": IDS},
    "logprob_token_ids, wide": {"logprob_token_ids": list(range(128))},
    "logprob_token_ids, sampled": {
        "logprob_token_ids": IDS, "temperature": 0.7, "top_k": 1, "frequency_penalty": 0.5
    },
    "logprob_token_ids, flat": {"logprob_token_ids": IDS, "flat_logprobs": True},
}  # fmt: skip
SAME_ANSWER = {
    *("extra_args", "ignore_eos", "output_kind", "seed", "skip_clone", "skip_reading_prefix_cache"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "temperature"),
    *("top_k", "top_p", "watermarking"),
}
"""Fields that leave the answer of a whole request as it is, or that only matter with others."""

SETTINGS: dict[str, Any] = {
    "max_logprobs": -1,
    "reasoning_config": ReasoningConfig(reasoning_start_str=START, reasoning_end_str=END),
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def params(name: str) -> SamplingParams:
    given = (VALUES | MORE)[name]
    return SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, **given})


def answer(output) -> dict[str, Any]:
    """All that a client gets of one request."""
    return {
        "outputs": [
            {
                "token_ids": list(choice.token_ids),
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "cumulative_logprob": choice.cumulative_logprob,
                "logprobs": positions(choice.logprobs),
            }
            for choice in output.outputs
        ],
        "prompt_logprobs": positions(output.prompt_logprobs),
        "prompt_token_id_logprobs": output.prompt_token_id_logprobs,
    }


def positions(logprobs) -> list[dict[str, Any]] | None:
    if logprobs is None:
        return None
    return [
        None
        if position is None
        else {
            "ranks": {token: entry.rank for token, entry in position.items()},
            "decoded": {token: entry.decoded_token for token, entry in position.items()},
            "logprobs": {token: entry.logprob for token, entry in position.items()},
        }
        for position in logprobs
    ]


def assert_same(ours, plain, where="") -> None:
    """Numbers may differ by rounding: a verify step computes them in another batch."""
    assert type(ours) is type(plain), where
    if isinstance(ours, dict):
        assert ours.keys() == plain.keys(), where
        for key in ours:
            assert_same(ours[key], plain[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(plain), where
        for index, (one, other) in enumerate(zip(ours, plain, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(ours, float | np.ndarray):
        np.testing.assert_allclose(ours, plain, atol=1e-3, err_msg=where)
    else:
        assert ours == plain, where


def ask(engine, prompt) -> dict[str, Any]:
    assert len(prompt) == PROMPT_LEN
    names = [*VALUES, *MORE]
    prompts = [TokensPrompt(prompt_token_ids=prompt)] * len(names)
    outputs = engine.llm.generate(prompts, [params(name) for name in names], use_tqdm=False)
    return {name: answer(output) for name, output in zip(names, outputs, strict=True)}


@pytest.fixture(scope="module")
def plain(pool, checkpoint, prompts):
    return ask(pool.get(checkpoint, **SETTINGS), prompts[0])


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, marks=pytest.mark.slow), True],
    ids=["sync", "async"],
)
def ours(request, pool, checkpoint, prompts):
    engine = pool.layerskip(checkpoint, 3, 4, async_scheduling=request.param, **SETTINGS)
    with engine.counting() as counts:
        answers = ask(engine, prompts[0])
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    drafts = zip(counts.request_ids, counts.drafts, strict=True)
    drafted = {owner for owner, (num_drafted, _) in drafts if num_drafted}
    # Both choices of n=2 are requests of their own.
    assert len(drafted) == len(answers) + 1, "a request got no draft"
    return answers


def test_every_field_that_works_has_a_value_here():
    assert set(VALUES) == set(fields_that("works"))


@pytest.mark.parametrize("name", [*VALUES, *MORE])
def test_answers_are_plain_vllms(ours, plain, name):
    assert_same(ours[name], plain[name])
    assert ours[name]["outputs"][0]["token_ids"]


def test_the_values_matter(plain):
    assert {name for name in VALUES if str(plain[name]) == str(plain["none"])} == SAME_ANSWER
    (choice,) = plain["repetition_detection"]["outputs"]
    assert choice["finish_reason"] == "repetition"


@pytest.mark.parametrize("name", fields_that("refused by vLLM"))
def test_fields_that_vllm_refuses_with_speculation(pool, checkpoint, prompts, name):
    values = {"min_p": 0.1, "logit_bias": {5: 1.0}, "trace_decode_token_ids": [5, 6]}
    engine = pool.layerskip(checkpoint, 3, 4, async_scheduling=False, **SETTINGS)
    with pytest.raises((VLLMValidationError, ValueError), match="speculative decoding"):
        engine.generate(prompts[:1], SamplingParams(temperature=0.5, **{name: values[name]}))
