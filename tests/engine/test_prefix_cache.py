# SPDX-License-Identifier: Apache-2.0
"""The prefix cache holds what plain vLLM's holds, and no draft.

Catches a block published with draft tokens, an EAGLE-like block drop (hits one block
short), and reuse for a row that has no exit states (pitfalls T1, T2).
"""

from __future__ import annotations

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


def test_hits_and_tokens_equal_plain_vllm(pool, checkpoint, prompts):
    settings = {"block_size": BLOCK_SIZE}
    plain = pool.get(checkpoint, **settings)
    engine = pool.layerskip(checkpoint, 3, 5, **settings)
    first = prompts[2][:70]
    (answer, _), *_ = cached_tokens(plain, [first], 45)
    # A, a longer B on top of A and its answer (whose blocks were filled while drafting), A, B.
    longer = first + answer + prompts[3][1:20]
    sequence = [first, longer, first, longer]
    plain.reset_prefix_cache()
    expected = cached_tokens(plain, sequence, 45)
    with engine.counting() as counts:
        assert cached_tokens(engine, sequence, 45) == expected
    counts.assert_speculated()
    hits = [cached for _, cached in expected]
    assert hits[1] >= 3 * BLOCK_SIZE, "generated blocks are cached too"
    assert all(cached > 0 for cached in hits[1:])


def test_one_token_left_after_a_hit_while_another_request_runs(pool, checkpoint, prompts):
    """vLLM pads such a row with placeholder drafts: it looks like a decode and is none."""
    settings = {"block_size": BLOCK_SIZE}
    plain = pool.get(checkpoint, **settings)
    engine = pool.layerskip(checkpoint, 3, 5, **settings)
    prompt = prompts[2][: 2 * BLOCK_SIZE + 1]
    expected = plain.greedy([prompt, prompts[0]], max_tokens=40)

    engine.reset_prefix_cache()
    engine.greedy([prompt], max_tokens=1)  # Two full blocks of the prompt are cached now.
    batches = []
    covered = engine.runner.model_state._covered

    def recording(input_batch):
        result = covered(input_batch)
        batches.append((input_batch.has_prefill, list(input_batch.num_scheduled_tokens), result))
        return result

    engine.runner.model_state._covered = recording
    try:
        engine.start("running", prompts[0], max_tokens=40)
        tokens = {}
        for _ in range(4):
            tokens.update(engine.step())
        engine.start("cached", prompt, max_tokens=40)
        tokens.update(engine.run_to_end())
    finally:
        del engine.runner.model_state._covered

    assert [tokens["cached"], tokens["running"]] == expected
    padded = [reused for prefill, scheduled, reused in batches if prefill and scheduled == [6, 6]]
    assert padded, "the row was not padded: the case under test did not happen"
    assert not any(padded)
    assert any(reused for *_, reused in batches)
