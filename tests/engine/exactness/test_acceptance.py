# SPDX-License-Identifier: Apache-2.0
"""Drafts matter and do no harm: equal tokens alone would not show drafts that do nothing."""

from __future__ import annotations

import pytest
from checkpoints import load_reference, random_llama
from unit.evaluation.reference import accepted_runs

from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement

PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
def test_late_layers_that_add_nothing_accept_every_draft(pool, tmp_path_factory, reuse):
    model = random_llama(tmp_path_factory.mktemp("identity") / "model", identity_from=2)
    expected = pool.get(model).greedy(PROMPTS, max_tokens=60)
    engine = pool.layerskip(model, 2, 5, spec={"reuse_exit_states": reuse})
    with engine.counting() as counts:
        assert engine.greedy(PROMPTS, max_tokens=60) == expected
    # The last step's tokens may be cut by max_tokens: vLLM counts what it could still emit.
    whole = [accepted for drafted, accepted in counts.drafts if drafted == 5]
    assert len(whole) >= 27
    assert whole == [5] * len(whole)
    assert counts.num_accepted_tokens == counts.num_draft_tokens


def test_a_scrambled_exit_head_loses_acceptance_and_no_token(pool, checkpoint, prompts):
    expected = pool.get(checkpoint).greedy(prompts[:3], max_tokens=30)
    engine = pool.layerskip(checkpoint, 3, 4)
    with engine.counting() as healthy:
        assert engine.greedy(prompts[:3], max_tokens=30) == expected
    model = engine.runner.model
    exit_norm = model.exit_norm
    model.exit_norm = lambda hidden_states, residual: exit_norm(hidden_states, residual).flip(-1)
    try:
        with engine.counting() as scrambled:
            assert engine.greedy(prompts[:3], max_tokens=30) == expected
    finally:
        del model.exit_norm
    assert scrambled.num_verify_steps_reused > 0
    assert scrambled.acceptance_length < 1.3 < healthy.acceptance_length


def test_verification_really_starts_from_the_buffer(pool, checkpoint, prompts):
    """Negative control: spoil the buffer and tokens change, with reuse and only with it."""
    expected = pool.get(checkpoint).greedy(prompts[:3], max_tokens=30)
    for reuse in (True, False):
        engine = pool.layerskip(checkpoint, 3, 4, spec={"reuse_exit_states": reuse})
        states = engine.runner.model_state.draft_state.exit_states
        store = states.store

        def store_nothing(*args, states=states):
            states.states.zero_()

        states.store = store_nothing
        try:
            tokens = engine.greedy(prompts[:3], max_tokens=30)
        finally:
            states.store = store
        assert (tokens == expected) != reuse


@pytest.mark.parametrize(("exit_layer", "num_speculative_tokens"), [(1, 3), (2, 5), (6, 7)])
def test_acceptance_equals_the_reference_draft_for_draft(
    pool, checkpoint, prompts, exit_layer, num_speculative_tokens
):
    """The engine accepts, step by step, what transformers' forward pass says it should."""
    num_new_tokens = 60
    model = load_reference(checkpoint)
    answers = generate_greedily(model, [prompts[0]], num_new_tokens, ())
    agreement = measure_agreement(model, [prompts[0]], answers, (exit_layer,))
    (row,) = agreement.matches[0].tolist()
    expected = accepted_runs(row, num_speculative_tokens)
    engine = pool.layerskip(checkpoint, exit_layer, num_speculative_tokens)
    with engine.counting() as counts:
        engine.greedy(prompts[:1], max_tokens=num_new_tokens)
    assert [accepted for _, accepted in counts.drafts][: len(expected)] == expected
    assert len(expected) > 5


def test_counters_are_consistent(pool, checkpoint, prompts):
    engine = pool.layerskip(checkpoint, 3, 5)
    with engine.counting() as counts:
        engine.greedy(prompts, max_tokens=30)
    per_position = counts.accepted_per_position
    assert per_position == sorted(per_position, reverse=True)
    assert sum(per_position) == counts.num_accepted_tokens <= counts.num_draft_tokens
    assert counts.num_verify_steps_reused + counts.num_verify_steps_full <= counts.num_drafts


# The embedded checkpoint's, E = 3, on the six prompts, by transformers (evaluation/scores.py).
ACCEPTANCE_RATES = (0.48, 0.265, 0.206, 0.152, 0.123)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("sample_method", ["greedy", "probabilistic"])
def test_acceptance_per_position_does_not_fall(
    pool, checkpoint, prompts, sample_method, async_scheduling
):
    """A drafter that got worse (wrong exit head, a stale input) shows up here first."""
    engine = pool.layerskip(
        checkpoint,
        3,
        5,
        spec={"draft_sample_method": sample_method},
        async_scheduling=async_scheduling,
    )
    with engine.counting() as counts:
        engine.greedy(prompts, max_tokens=80)
    assert counts.num_drafts > 150
    rates = [accepted / counts.num_drafts for accepted in counts.accepted_per_position]
    for position, (rate, expected) in enumerate(zip(rates, ACCEPTANCE_RATES, strict=True)):
        assert rate > expected - 0.03, f"draft {position}: {rate:.3f} < {expected}"
