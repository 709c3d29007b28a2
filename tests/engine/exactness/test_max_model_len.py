# SPDX-License-Identifier: Apache-2.0
"""Requests that reach the model's last position (docs/tests.md, T5).

A draft past the end must not overwrite the K/V of the last real tokens. Every residue
0..K+1 of the distance to the end is met, with batches of one and of many.
"""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

MAX_MODEL_LEN = 96


def run_to_the_end(engine, prompts):
    params = SamplingParams(temperature=0, max_tokens=MAX_MODEL_LEN, ignore_eos=True)
    outputs = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False
    )
    return [(list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs]


@pytest.mark.parametrize("num_speculative_tokens", [1, 4, 7])
@pytest.mark.parametrize("model_name", ["checkpoint", "random_checkpoint"])
def test_every_residue(pool, request, prompts, num_speculative_tokens, model_name):
    model = request.getfixturevalue(model_name)
    settings = {"max_model_len": MAX_MODEL_LEN, "block_size": 32}
    source = [token % 60 + 3 for token in prompts[2]] if model_name != "checkpoint" else prompts[2]
    # A random model accepts nearly nothing, so a request walks through every residue itself;
    # with accepted drafts the prompt's length shifts where the walk ends.
    batch = [
        source[: MAX_MODEL_LEN - 14 - residue] for residue in range(num_speculative_tokens + 2)
    ]
    expected = run_to_the_end(pool.get(model, **settings), batch)
    assert all(reason == "length" for _, reason in expected)
    assert [len(p) + len(t) for p, (t, _) in zip(batch, expected, strict=True)] == [
        MAX_MODEL_LEN
    ] * len(batch)
    engine = pool.layerskip(model, 3, num_speculative_tokens, **settings)
    with engine.counting() as counts:
        assert run_to_the_end(engine, batch) == expected
    counts.assert_speculated()
    engine.reset_prefix_cache()
    for prompt, answer in zip(batch, expected, strict=True):
        assert run_to_the_end(engine, [prompt]) == [answer]


def test_drafts_end_with_a_length_that_was_fitted_to_memory(pool, random_checkpoint):
    """Block tables are as long as the fitted length; a draft past it would read the next row."""
    settings = {"max_model_len": -1, "kv_cache_memory_bytes": 1 << 20}
    engine = pool.layerskip(random_checkpoint, 2, 5, **settings)
    fitted = engine.vllm_config.model_config.max_model_len
    assert fitted < 512, "the checkpoint's own length fits, so nothing was lowered"
    block_tables, last_positions = engine.runner.block_tables, []
    compute_slot_mappings = block_tables.compute_slot_mappings

    def observed(idx_mapping, query_start_loc, positions, *args, **kwargs):
        if positions.shape == idx_mapping.shape:  # One token per row: a draft pass.
            last_positions.extend(positions[idx_mapping >= 0].tolist())
        return compute_slot_mappings(idx_mapping, query_start_loc, positions, *args, **kwargs)

    block_tables.compute_slot_mappings = observed
    prompt = [3 + token % 60 for token in range(fitted - 12)]
    with engine.counting() as counts:
        tokens = engine.greedy([prompt], 40)
    del block_tables.compute_slot_mappings
    assert tokens == pool.get(random_checkpoint, **settings).greedy([prompt], 40)
    assert counts.num_drafts > 0
    assert max(last_positions) == fitted - 1
