# SPDX-License-Identifier: Apache-2.0
"""Catch a sampling parameter that vLLM understands otherwise, and a wrong value that passes."""

from __future__ import annotations

import pytest

from vllm_layerskip.batch.parameters import SamplingParameters, merged


def test_parameters_are_vllms_and_have_vllms_meaning():
    from vllm import SamplingParams

    params = SamplingParams(**merged({}, None))
    for name, default in SamplingParameters().model_dump().items():
        value = getattr(params, name)
        assert value == default or (default is None and not value), name


def test_every_default_is_valid_and_every_parameter_says_what_is():
    defaults = SamplingParameters().model_dump()
    assert SamplingParameters.model_validate(defaults).model_dump() == defaults
    assert all(field.description for field in SamplingParameters.model_fields.values())


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ([], "must be an object, not []"),
        ({"min_p": 0.1, "top_p": 0}, "'min_p' is not supported. Valid are temperature, top_p,"),
        ({"temperature": "1"}, "temperature='1' must be a number from 0 to 2."),
        ({"temperature": float("nan")}, "temperature=nan must be a number from 0 to 2."),
        ({"temperature": True}, "temperature=True must be a number from 0 to 2."),
        ({"temperature": 2.1}, "temperature=2.1 must be a number from 0 to 2."),
        ({"top_p": 0}, "top_p=0 must be a number above 0, at most 1."),
        ({"top_k": 1.0}, "top_k=1.0 must be an integer from 0 to 2147483647; 0 for all tokens."),
        ({"top_k": 2**31}, "top_k=2147483648 must be an integer from 0"),
        ({"max_tokens": 2**70}, "must be an integer from 1 to 1000000000."),
        ({"stop": ["a", ""]}, "stop=['a', ''] must be a text or a list of texts, none of them"),
        ({"stop": ""}, "stop=[''] must be a text or a list of texts, none of them empty."),
        ({"stop": ["\ud83d"]}, "stop: the text has half of a surrogate pair"),
        ({"stop_token_ids": [True]}, "stop_token_ids=[True] must be a list of at most 100"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=[-1] must be a list of at most 100"),
        ({"stop_token_ids": [2**31]}, "must be a list of at most 100 token ids."),
        ({"stop_token_ids": list(range(101))}, "must be a list of at most 100 token ids."),
        ({"repetition_penalty": float("inf")}, "must be a number above 0, at most 1000000."),
        (
            {"max_completion_tokens": 3, "max_tokens": 4},
            "max_completion_tokens=3 and max_tokens=4 contradict each other. Give one of them.",
        ),
        ({"ignore_eos": 1}, "ignore_eos=1 must be true or false."),
        ({"seed": -(2**63) - 1}, "must be an integer of 64 bits."),
        ({"seed": 2**63}, "must be an integer of 64 bits."),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 must be at most max_tokens=8."),
    ],
)
def test_a_wrong_value_is_named_with_the_valid_ones(own, error):
    with pytest.raises(ValueError, match="^sampling_params") as raised:
        merged({}, own)
    assert error in str(raised.value)


def test_a_rows_own_parameters_win_and_the_rest_are_defaults():
    own = {"temperature": 1, "stop": ["a"], "seed": 2**63 - 1}
    values = merged({"temperature": 0.5, "top_k": 3}, own)
    assert values == {**merged({}, None), "temperature": 1.0, "top_k": 3} | {
        "stop": ["a"],
        "seed": 2**63 - 1,
    }


def test_openais_forms_are_accepted():
    own = {"stop": "\n", "max_tokens": None, "max_completion_tokens": 7, "top_p": None}
    values = merged({"top_p": 0.5}, own)
    assert values == {**merged({}, None), "stop": ["\n"], "max_tokens": 7, "top_p": 0.5}
    assert merged({}, {"max_completion_tokens": 7, "max_tokens": 7})["max_tokens"] == 7


def test_stop_tokens_fit_into_what_a_worker_holds():
    """More of them, with ``min_tokens``, end vLLM's worker and with it all requests."""
    from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_STOP_TOKEN_IDS

    most = merged({}, {"stop_token_ids": list(range(100))})["stop_token_ids"]
    num_ends_of_a_checkpoint = 10
    assert len(most) + num_ends_of_a_checkpoint <= MAX_NUM_STOP_TOKEN_IDS
