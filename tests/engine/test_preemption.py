# SPDX-License-Identifier: Apache-2.0
"""Requests that lose their blocks and slots in the middle of generating (pitfalls T3, T26)."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
def test_preempted_requests_end_as_if_alone(pool, checkpoint, prompts, reuse):
    roomy = {"block_size": 32, "enable_prefix_caching": False}
    tight = {**roomy, "num_gpu_blocks_override": 13}
    batch = [prompts[0], prompts[3], prompts[4], prompts[5]]
    plain = pool.get(checkpoint, **roomy)
    expected = [plain.greedy([prompt], max_tokens=90)[0] for prompt in batch]
    engine = pool.layerskip(checkpoint, 3, 4, spec={"reuse_exit_states": reuse}, **tight)
    with engine.counting() as counts:
        assert engine.greedy(batch, max_tokens=90) == expected
    assert counts.num_preemptions > 0, "nothing was preempted"
    counts.assert_speculated()
    assert (counts.num_verify_steps_reused > 0) == reuse


def test_abort_frees_a_slot_for_a_new_request(pool, checkpoint, prompts):
    """The survivor is undisturbed, and the newcomer never sees its predecessor's exit states."""
    settings = {"max_num_seqs": 2}
    plain = pool.get(checkpoint, **settings)
    survivor, newcomer = plain.greedy([prompts[0]], 60)[0], plain.greedy([prompts[4]], 30)[0]
    engine = pool.layerskip(checkpoint, 3, 4, **settings)
    engine.reset_prefix_cache()
    with engine.counting() as counts:
        engine.start("survivor", prompts[0], max_tokens=60)
        engine.start("aborted", prompts[3], max_tokens=60)
        for _ in range(6):
            engine.step()
        slots = dict(engine.runner.req_states.req_id_to_index)
        (slot,) = [index for name, index in slots.items() if name.startswith("aborted")]
        assert engine.runner.model_state.exit_states.num_valid_np[slot] == 4
        engine.abort("aborted")
        engine.start("newcomer", prompts[4], max_tokens=30)
        tokens = engine.run_to_end()
    assert tokens["survivor"] == survivor
    assert tokens["newcomer"] == newcomer
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0


def test_many_short_requests_take_turns_in_the_slots(pool, checkpoint, prompts):
    settings = {"max_num_seqs": 3}
    batch = [prompts[i % 6][: 5 + 3 * i] for i in range(14)]
    expected = pool.get(checkpoint, **settings).greedy(batch, max_tokens=11)
    engine = pool.layerskip(checkpoint, 3, 4, **settings)
    with engine.counting() as counts:
        assert engine.greedy(batch, max_tokens=11) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
