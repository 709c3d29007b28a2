# SPDX-License-Identifier: Apache-2.0
"""Greedy output in float32 equals plain decoding, token for token.

Catches a draft pass at a wrong position or slot, a wrong exit state and a reuse that was
not allowed: each is wrong output here, not low acceptance.
"""

from __future__ import annotations

import pytest

EXIT_LAYERS = (1, 3, 6, 11)  # 1, L/4, L/2, L-1
NUM_SPECULATIVE_TOKENS = (1, 4, 7)


@pytest.mark.parametrize("num_speculative_tokens", NUM_SPECULATIVE_TOKENS)
@pytest.mark.parametrize("exit_layer", EXIT_LAYERS)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
def test_mixed_lengths_and_more_requests_than_slots(
    pool, checkpoint, prompts, exit_layer, num_speculative_tokens, reuse
):
    expected = pool.get(checkpoint).greedy(prompts, max_tokens=24)
    engine = pool.layerskip(
        checkpoint, exit_layer, num_speculative_tokens, spec={"reuse_exit_states": reuse}
    )
    with engine.counting() as counts:
        assert engine.greedy(prompts, max_tokens=24) == expected
    counts.assert_speculated()
    if reuse:
        assert counts.num_verify_steps_reused > 0
    else:
        assert counts.num_verify_steps_reused == 0
        assert counts.num_verify_steps_full > 0


@pytest.mark.parametrize("num_speculative_tokens", NUM_SPECULATIVE_TOKENS)
@pytest.mark.parametrize("exit_layer", EXIT_LAYERS)
def test_batch_of_one_reuses_in_every_verify_step(
    pool, checkpoint, prompts, exit_layer, num_speculative_tokens
):
    expected = pool.get(checkpoint).greedy(prompts[:1], max_tokens=32)
    engine = pool.layerskip(
        checkpoint, exit_layer, num_speculative_tokens, spec={"reuse_exit_states": True}
    )
    with engine.counting() as counts:
        assert engine.greedy(prompts[:1], max_tokens=32) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    # Only the last steps may be short of drafts, when max_model_len cuts them.
    assert counts.num_verify_steps_full == 0


def test_rejections_on_random_weights(pool, random_checkpoint):
    """Nearly every draft is rejected: nothing may read its K/V."""
    prompts = [[0, *range(3, 3 + length)] for length in (1, 9, 31, 32)]
    expected = pool.get(random_checkpoint).greedy(prompts, max_tokens=150)
    engine = pool.layerskip(random_checkpoint, 1, 4)
    with engine.counting() as counts:
        assert engine.greedy(prompts, max_tokens=150) == expected
    assert counts.num_drafts > 200
    assert counts.num_accepted_tokens < 0.5 * counts.num_draft_tokens
    assert counts.num_verify_steps_reused > 0


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
def test_chunked_prefill_mixes_prefill_and_decode(pool, checkpoint, prompts, reuse):
    settings = {"max_num_batched_tokens": 48, "enable_prefix_caching": False}
    assert max(map(len, prompts)) > 48
    expected = pool.get(checkpoint, **settings).greedy(prompts, max_tokens=24)
    engine = pool.layerskip(checkpoint, 3, 4, spec={"reuse_exit_states": reuse}, **settings)
    with engine.counting() as counts:
        assert engine.greedy(prompts, max_tokens=24) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_full > 0, "no step mixed prefill with verification"
    assert (counts.num_verify_steps_reused > 0) == reuse


def test_long_generation_across_many_blocks(pool, checkpoint, prompts):
    settings = {"block_size": 32}
    expected = pool.get(checkpoint, **settings).greedy(prompts[:3], max_tokens=100)
    engine = pool.layerskip(checkpoint, 3, 5, **settings)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], max_tokens=100) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 10
