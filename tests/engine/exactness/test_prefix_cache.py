# SPDX-License-Identifier: Apache-2.0
"""The prefix cache holds what plain vLLM's holds, and no draft.

Catches a block published with draft tokens, an EAGLE-like block drop (hits one block
short), and reuse for a row that has no exit states (docs/tests.md, T1, T2).
"""

from __future__ import annotations

import contextlib
import time
from unittest import mock

import pytest
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

BLOCK_SIZE = 32


def cached_tokens(engine, prompts, max_tokens):
    """(tokens, cached prompt tokens) of each prompt, sent one after the other."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    results = []
    for prompt in prompts:
        (output,) = engine.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False
        )
        results.append((list(output.outputs[0].token_ids), output.num_cached_tokens))
    return results


@pytest.mark.parametrize(
    ("model_name", "async_scheduling"),
    [("checkpoint", False), ("checkpoint", True), ("random_checkpoint", False)],
    ids=["accepted", "accepted-async", "rejected"],
)
def test_hits_and_tokens_equal_plain_vllm(pool, request, prompts, model_name, async_scheduling):
    model, settings = request.getfixturevalue(model_name), {"block_size": BLOCK_SIZE}
    plain = pool.get(model, **settings)
    engine = pool.layerskip(model, 3, 5, async_scheduling=async_scheduling, **settings)
    engine.reset_prefix_cache()
    source = [
        token % 60 + 3 if model_name == "random_checkpoint" else token for token in prompts[2]
    ]
    first = source[:70]
    (answer, _), *_ = cached_tokens(plain, [first], 45)
    # A, a longer B on top of A and its answer (whose blocks were filled while drafting), A, B,
    # and A cut to whole blocks, of which one token must be computed again.
    longer = first + answer + source[1:20]
    sequence = [first, longer, first, longer, first[: 2 * BLOCK_SIZE], longer[: 3 * BLOCK_SIZE]]
    plain.reset_prefix_cache()
    expected = cached_tokens(plain, sequence, 45)
    with engine.counting() as counts:
        assert cached_tokens(engine, sequence, 45) == expected
    counts.assert_speculated()
    hits = [cached for _, cached in expected]
    assert hits[1] >= 3 * BLOCK_SIZE, "generated blocks are cached too"
    assert all(cached > 0 for cached in hits[1:])


@contextlib.contextmanager
def recorded_batches(engine):
    """(has_prefill, tokens of each row, drafts of each row, reuse) of every forward."""
    batches = []
    covered = engine.runner.model_state._covered

    def recording(input_batch):
        reuse = covered(input_batch)
        drafts = input_batch.num_draft_tokens_per_req
        batches.append(
            (
                input_batch.has_prefill,
                input_batch.num_scheduled_tokens.tolist(),
                [] if drafts is None else drafts.tolist(),
                reuse,
            )
        )
        return reuse

    with mock.patch.object(engine.runner.model_state, "_covered", recording):
        yield batches


def assert_padded_and_not_reused(batches, num_rows=2):
    """A one-token prefill was padded with placeholder drafts, in a batch like one of decodes."""
    padded = [
        reuse
        for has_prefill, tokens, _, reuse in batches
        if has_prefill and tokens == [6] * num_rows
    ]
    assert padded, "no row was padded: the case under test did not happen"
    assert not any(padded)
    assert any(reuse for *_, reuse in batches)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_one_token_left_after_a_hit_while_another_request_runs(
    pool, checkpoint, prompts, async_scheduling
):
    """vLLM pads such a row with placeholder drafts: it looks like a decode and is none."""
    settings = {"block_size": BLOCK_SIZE}
    plain = pool.get(checkpoint, **settings)
    engine = pool.layerskip(checkpoint, 3, 5, async_scheduling=async_scheduling, **settings)
    prompt = prompts[2][: 2 * BLOCK_SIZE + 1]
    expected = plain.greedy([prompt, prompts[0]], max_tokens=40)

    engine.reset_prefix_cache()
    engine.greedy([prompt], max_tokens=1)  # Two full blocks of the prompt are cached now.
    with recorded_batches(engine) as batches, engine.counting() as counts:
        engine.start("running", prompts[0], max_tokens=40)
        tokens = {}
        for _ in range(4):
            tokens.update(engine.step())
        engine.start("cached", prompt, max_tokens=40)
        tokens.update(engine.run_to_end())
    assert [tokens["cached"], tokens["running"]] == expected
    assert 0 not in tokens["cached"], "the id of a placeholder draft came out"
    assert_padded_and_not_reused(batches)
    counts.assert_speculated()


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_one_token_left_of_a_resumed_request(pool, checkpoint, prompts, async_scheduling):
    """Preempted between its drafts and their verification, and back with all but one token."""
    settings = {"block_size": BLOCK_SIZE}
    batch = {"preempted": prompts[0], "running": prompts[3]}
    plain = pool.get(checkpoint, **settings)
    expected = dict(zip(batch, plain.greedy(list(batch.values()), max_tokens=150), strict=True))
    engine = pool.layerskip(checkpoint, 3, 5, async_scheduling=async_scheduling, **settings)
    engine.reset_prefix_cache()
    scheduler, tokens, num_preempted = engine.scheduler, {}, 0
    with recorded_batches(engine) as batches, engine.counting() as counts:
        for name, prompt in batch.items():
            engine.start(name, prompt, max_tokens=150)
        while engine.llm.llm_engine.has_unfinished_requests():
            tokens.update(engine.step())
            requests = [r for r in scheduler.running if r.request_id.startswith("preempted")]
            # Whole blocks are in the prefix cache, so that one token is left.
            if (
                requests
                and requests[0].num_tokens % BLOCK_SIZE == 1
                and len(scheduler.running) == 2
            ):
                scheduler.running.remove(requests[0])
                scheduler._preempt_request(requests[0], time.monotonic(), drop_stale_output=True)
                num_preempted += 1
    assert num_preempted > 0
    assert tokens == expected
    assert 0 not in tokens["preempted"], "the id of a placeholder draft came out"
    assert_padded_and_not_reused(batches)
    counts.assert_speculated()


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_one_token_left_after_chunks_of_a_prompt(pool, checkpoint, prompts, async_scheduling):
    chunk = 48
    settings = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": chunk}
    prompt = prompts[2][: 2 * chunk + 1]
    plain = pool.get(checkpoint, block_size=BLOCK_SIZE)
    expected = plain.greedy([prompts[1], prompt], max_tokens=40)
    engine = pool.layerskip(checkpoint, 3, 5, async_scheduling=async_scheduling, **settings)
    engine.reset_prefix_cache()
    for alone in (True, False):
        engine.reset_prefix_cache()
        with recorded_batches(engine) as batches, engine.counting() as counts:
            batch = [prompt] if alone else [prompts[1], prompt]
            assert engine.greedy(batch, max_tokens=40) == expected[-len(batch) :]
        assert not any(reuse for has_prefill, *_, reuse in batches if has_prefill)
        counts.assert_speculated()
        if alone:
            assert (True, [1], [], False) in batches, "no last chunk of one token"


@pytest.mark.parametrize("num_speculative_tokens", [1, 8])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cache", "no-cache"])
def test_drafts_of_one_and_of_eight_tokens(
    pool, checkpoint, prompts, num_speculative_tokens, prefix_caching
):
    """Few and many drafts, with prompts that share their beginnings; each prompt twice."""
    settings = {"block_size": BLOCK_SIZE, "enable_prefix_caching": prefix_caching}
    batch = [prompts[2][:length] for length in (40, 70, 71, 96)] * 2
    expected = pool.get(checkpoint, block_size=BLOCK_SIZE).greedy(batch, max_tokens=40)
    engine = pool.layerskip(checkpoint, 3, num_speculative_tokens, **settings)
    with engine.counting() as counts:
        assert engine.greedy(batch, max_tokens=40) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
