# SPDX-License-Identifier: Apache-2.0
"""Ways to ask for LayerSkip, and vLLM's own options through it."""

from __future__ import annotations

import pytest
from checkpoints import with_config
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

MAX_TOKENS = 24


@pytest.fixture
def expected(pool, checkpoint, prompts):
    return pool.get(checkpoint).greedy(prompts[:3], max_tokens=MAX_TOKENS)


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 5},
        {"model": "[self]", "exit_layer": 3, "num_speculative_tokens": 5},
        {"method": "layerskip", "model": "[self]", "exit_layer": "auto"},
        {"model": "[self]"},
    ],
    ids=["method", "self", "auto", "self-only"],
)
def test_ways_to_ask(pool, checkpoint, prompts, expected, request_):
    engine = pool.get(checkpoint, speculative_config=request_)
    config = engine.vllm_config.speculative_config
    assert (config.exit_layer, config.num_speculative_tokens) == (3, 5)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0


def test_auto_reads_the_checkpoints_block(pool, checkpoint, prompts, expected, tmp_path):
    model = with_config(
        checkpoint, tmp_path / "m", layerskip={"exit_layer": 4, "num_speculative_tokens": 2}
    )
    engine = pool.get(model, speculative_config={"method": "layerskip"})
    config = engine.vllm_config.speculative_config
    assert (config.exit_layer, config.num_speculative_tokens) == (4, 2)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
    counts.assert_speculated()


def test_auto_without_the_block_is_an_error(pool, checkpoint, tmp_path):
    model = with_config(checkpoint, tmp_path / "m", layerskip=None)
    with pytest.raises(ValueError, match="exit_layer='auto'.*config.json has no 'layerskip' block"):
        pool.get(model, speculative_config={"method": "layerskip"})


@pytest.mark.parametrize("sample_method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("rejection_method", ["standard", "block"])
def test_greedy_requests_under_every_sampling_option(
    pool, checkpoint, prompts, expected, sample_method, rejection_method
):
    spec = {"draft_sample_method": sample_method, "rejection_sample_method": rejection_method}
    engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0


@pytest.mark.parametrize(
    ("option", "length"),
    [
        ({"synthetic_acceptance_length": 3.0}, 3.0),
        ({"synthetic_acceptance_rates": [0.9, 0.6, 0.3, 0.1]}, 2.9),
    ],
    ids=["length", "rates"],
)
def test_synthetic_acceptance_separates_cost_from_quality(
    pool, checkpoint, prompts, option, length
):
    spec = {"rejection_sample_method": "synthetic", **option}
    engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
    with engine.counting() as counts:
        engine.greedy(prompts[:4], max_tokens=100)
    whole = [accepted for drafted, accepted in counts.drafts if drafted == 4]
    assert 1 + sum(whole) / len(whole) == pytest.approx(length, abs=0.35)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_schedule_shrinks_k_to_zero_as_the_batch_grows(pool, checkpoint, prompts, async_scheduling):
    schedule = [(1, 1, 5), (2, 2, 2), (3, 4, 0)]
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=60)
    expected_short = [
        tokens[:length] for tokens, length in zip(expected, (60, 45, 30, 15), strict=True)
    ]
    engine = pool.layerskip(
        checkpoint,
        2,
        5,
        spec={"num_speculative_tokens_per_batch_size": schedule},
        async_scheduling=async_scheduling,
    )
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        for length in (60, 45, 30, 15)
    ]
    passes = []
    draft_pass = engine.runner.speculator._draft_pass

    def counting_pass(step, num_reqs, *args):
        passes.append(num_reqs)
        return draft_pass(step, num_reqs, *args)

    engine.runner.speculator._draft_pass = counting_pass
    try:
        with engine.counting() as counts:
            assert engine.generate(prompts[:4], params) == expected_short
    finally:
        del engine.runner.speculator._draft_pass
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    assert {drafted for drafted, _ in counts.drafts} >= {2, 5}
    assert 1 in passes
    assert 2 in passes
    assert max(passes) < 3, "draft passes ran where the schedule says none"


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_steps_without_drafts_between_steps_with(pool, checkpoint, prompts, async_scheduling):
    """A second request turns drafting off, and off and on again (docs/tests.md, T9)."""
    schedule = [(1, 1, 4), (2, 4, 0)]
    expected = pool.get(checkpoint).greedy(prompts[:3], max_tokens=100)
    engine = pool.layerskip(
        checkpoint,
        3,
        4,
        spec={"num_speculative_tokens_per_batch_size": schedule},
        async_scheduling=async_scheduling,
    )
    tokens: dict[str, list[int]] = {}
    drafts: dict[bool, int] = {False: 0, True: 0}
    engine.start("long", prompts[0], max_tokens=100)
    for name, prompt in (("first", prompts[1]), ("second", prompts[2])):
        while len(tokens.get("long", ())) < (20 if name == "first" else 60):
            with engine.counting() as counts:
                tokens.update(engine.step())
            drafts[False] += counts.num_accepted_tokens
        engine.start(name, prompt, max_tokens=12)
        for _ in range(3):  # Drafts made before it came are verified or dropped first.
            tokens.update(engine.step())
        while len(tokens.get(name, ())) < 12:
            with engine.counting() as counts:
                tokens.update(engine.step())
            drafts[True] += counts.num_draft_tokens
    with engine.counting() as counts:
        tokens.update(engine.run_to_end())
    drafts[False] += counts.num_accepted_tokens
    assert tokens["long"] == expected[0]
    assert tokens["first"] == expected[1][:12]
    assert tokens["second"] == expected[2][:12]
    assert drafts[True] == 0, "drafted where the schedule says none"
    assert drafts[False] > 10


SAMPLING_FEATURES = {
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "allowed_token_ids": {"allowed_token_ids": list(range(20, 200))},
    "min_tokens": {"min_tokens": 20},
    "stop_token_ids": {"stop_token_ids": list(range(260, 330))},
    "top_k": {"temperature": 0.7, "top_k": 1},
    "top_p": {"temperature": 0.7, "top_p": 1e-6},
}


@pytest.mark.parametrize("feature", SAMPLING_FEATURES)
def test_sampling_features_give_plain_vllms_tokens(pool, checkpoint, prompts, feature):
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, **SAMPLING_FEATURES[feature]}
    params = SamplingParams(**settings)
    expected = pool.get(checkpoint).generate(prompts[:3], params)
    engine = pool.layerskip(checkpoint, 3, 4)
    with engine.counting() as counts:
        assert engine.generate(prompts[:3], params) == expected
    assert counts.num_drafts > 0


@pytest.mark.parametrize("parameter", [{"min_p": 0.1}, {"logit_bias": {5: 1.0}}])
def test_parameters_that_vllm_refuses_with_speculation(pool, checkpoint, prompts, parameter):
    engine = pool.layerskip(checkpoint, 3, 4)
    with pytest.raises(VLLMValidationError, match="speculative"):
        engine.generate(prompts[:1], SamplingParams(temperature=0.5, **parameter))
