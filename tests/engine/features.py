# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters that a request may have: one of each, on prompts of the checkpoint."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

MAX_TOKENS = 48
REGEX = r"def [a-z_]{3,12}\(self\):\n    return [0-9]{1,6}"
# Words of the checkpoint's own answer, or it would draft nothing that the schema allows.
PROPERTY = "the query of the querying the query"
SCHEMA = {
    "type": "object",
    "properties": {PROPERTY: {"enum": ["default", "is"]}, "string": {"type": "boolean"}},
    "required": [PROPERTY, "string"],
    "additionalProperties": False,
}


FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "bad_words": {"bad_words": [" the", " of", ".", ":", "?"]},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": list(range(260, 360))},
    "allowed_token_ids": {"allowed_token_ids": list(range(20, 200))},
    # Seven to fourteen tokens into the answers, so that something is drafted before the stop.
    "stop_token_ids": {"stop_token_ids": [28, 618]},
    "stop": {"stop": ["the", "self", "in"]},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "regex": {"structured_outputs": {"regex": REGEX}},
    "json": {"structured_outputs": {"json": SCHEMA}},
    "temperature": {"temperature": 0.8, "seed": 11},
    "top_p": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11},
}
SAMPLED = ("temperature", "top_p")
ADD_TO_THE_OUTPUT = ("none", "logprobs", "prompt_logprobs")


def sampling_params(feature: str) -> SamplingParams:
    params = {"temperature": 0, "max_tokens": MAX_TOKENS, **FEATURES[feature]}
    if "structured_outputs" in params:
        params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
    return SamplingParams(**params)
