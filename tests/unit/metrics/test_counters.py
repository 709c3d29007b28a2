# SPDX-License-Identifier: Apache-2.0
"""Catch counters of the wrong series, and an engine without any that is not named."""

from types import SimpleNamespace

import pytest

from vllm_layerskip.counters import SpecDecodeCounters, read_counters


def engine(**metrics):
    found = [
        SimpleNamespace(name=name, **{"values" if isinstance(value, list) else "value": value})
        for name, value in metrics.items()
    ]
    return SimpleNamespace(get_metrics=lambda: found)


VLLMS = {
    "vllm:spec_decode_num_drafts": 4,
    "vllm:spec_decode_num_draft_tokens": 12,
    "vllm:spec_decode_num_accepted_tokens": 6,
    "vllm:spec_decode_num_accepted_tokens_per_pos": [3, 2, 1],
}
OURS = {
    "vllm_layerskip:num_verify_steps_reused": 3,
    "vllm_layerskip:num_verify_steps_full": 1,
}


def test_counters_are_the_series():
    counters = read_counters(engine(**VLLMS, **OURS))
    assert counters == SpecDecodeCounters(4, 12, 6, (3, 2, 1), 3, 1)
    assert counters.acceptance_length == 2.5
    assert counters - counters == SpecDecodeCounters(0, 0, 0, (0, 0, 0), 0, 0)


def without_statistics():
    raise AssertionError("Stat logging disabled")  # As vLLM's LLMEngine does.


@pytest.mark.parametrize(
    "llm",
    [engine(), engine(**VLLMS), SimpleNamespace(get_metrics=without_statistics)],
    ids=["plain", "another method", "no statistics"],
)
def test_an_engine_without_our_series_is_named(llm):
    with pytest.raises(ValueError, match=r"'layerskip'.* and disable_log_stats=False"):
        read_counters(llm)
