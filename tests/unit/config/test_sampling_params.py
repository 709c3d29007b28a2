# SPDX-License-Identifier: Apache-2.0
"""Catch a field of vLLM's ``SamplingParams`` that nobody has looked at with drafts, in the
installed vLLM and in later ones, and a refusal that vLLM no longer makes."""

from __future__ import annotations

import pytest
from sampling_fields import fields_of_the_page, fields_that
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

VERDICTS = {"works", "refused by vLLM", "no effect"}


def test_every_field_has_one_verdict_in_the_features_page():
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    page = fields_of_the_page()
    assert fields - page.keys() == set(), (
        "new fields: compare vLLM's sampler and rejection sampler for each, then add it to "
        "docs/features.md, and to engine/features/test_sampling_params if it works"
    )
    assert page.keys() - fields == set(), "vLLM has these no more"
    assert set(page.values()) == VERDICTS


REFUSED = {"min_p": 0.1, "logit_bias": {5: 1.0}, "trace_decode_token_ids": [5, 6]}


@pytest.mark.parametrize("name", fields_that("refused by vLLM"))
def test_vllm_refuses_in_the_front_end(engine_config, name):
    config = engine_config({"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3})
    given = SamplingParams(temperature=0.5, **{name: REFUSED[name]})
    with pytest.raises((VLLMValidationError, ValueError), match="speculative decoding"):
        given.verify(config.model_config, config.speculative_config, None, None)
    SamplingParams(temperature=0.5).verify(
        config.model_config, config.speculative_config, None, None
    )
