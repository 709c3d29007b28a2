# SPDX-License-Identifier: Apache-2.0
"""Requests that lose their blocks and slots while they generate (docs/tests.md, T3, T26)."""

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
        assert engine.runner.model_state.draft_state.exit_states.num_valid_np[slot] == 4
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


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_preemption_between_drafting_and_verification(pool, checkpoint, prompts, async_scheduling):
    """All requests lose their slots with drafts pending, and come back in the same step."""
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=40)
    engine = pool.layerskip(checkpoint, 3, 4, async_scheduling=async_scheduling)
    tokens: dict[str, list[int]] = {}
    with engine.counting() as counts:
        for name, prompt in zip("abcd", prompts, strict=False):
            engine.start(name, prompt, max_tokens=40)
        for step in range(400):
            tokens.update(engine.step())
            if not engine.llm.llm_engine.has_unfinished_requests():
                break
            if step % 3 == 2:
                exit_states = engine.runner.model_state.draft_state.exit_states
                assert exit_states.num_valid_np.max() == 4, "no drafts are pending"
                engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert [tokens[name] for name in "abcd"] == expected
    assert counts.num_preemptions > 8
    counts.assert_speculated()


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_a_request_of_higher_priority_takes_the_blocks(pool, checkpoint, prompts, async_scheduling):
    roomy = {"block_size": 32, "enable_prefix_caching": False}
    batch = {"low": prompts[0], "lower": prompts[3], "high": prompts[2]}
    plain = pool.get(checkpoint, **roomy)
    expected = {name: plain.greedy([prompt], max_tokens=80)[0] for name, prompt in batch.items()}
    engine = pool.layerskip(
        checkpoint,
        3,
        4,
        scheduling_policy="priority",
        num_gpu_blocks_override=11,
        async_scheduling=async_scheduling,
        **roomy,
    )
    tokens: dict[str, list[int]] = {}
    with engine.counting() as counts:
        engine.start("lower", batch["lower"], max_tokens=80, priority=2)
        engine.start("low", batch["low"], max_tokens=80, priority=1)
        for _ in range(6):
            tokens.update(engine.step())
        engine.start("high", batch["high"], max_tokens=80, priority=0)
        tokens.update(engine.run_to_end())
    assert tokens == expected
    assert counts.preempted[0].startswith("lower-")
    assert not any(request_id.startswith("high-") for request_id in counts.preempted)
    counts.assert_speculated()
