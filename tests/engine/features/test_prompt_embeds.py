# SPDX-License-Identifier: Apache-2.0
"""Prompts given as embeddings, beside prompts of token ids, in one batch.

Catches an early stage that embeds placeholder ids in the place of a prompt's embeddings.
"""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_reference
from vllm import SamplingParams
from vllm.inputs import EmbedsPrompt, TokensPrompt

EMBEDS = {"enable_prompt_embeds": True, "max_num_batched_tokens": 48}
"""A budget that cuts the longest prompts in chunks."""


@pytest.fixture(scope="module")
def inputs(checkpoint, prompts):
    """Three prompts of embeddings that are no token's, three of token ids."""
    embedding = load_reference(checkpoint).get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    noise = embedding.std()
    mixed = []
    for number, prompt in enumerate(prompts):
        embeds = embedding[torch.tensor(prompt)]
        embeds = embeds + noise * torch.randn(embeds.shape, generator=generator)
        mixed.append(
            EmbedsPrompt(prompt_embeds=embeds)
            if number % 2
            else TokensPrompt(prompt_token_ids=prompt)
        )
    return mixed


def greedy(engine, inputs):
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = engine.llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_embeddings_and_token_ids_mixed_in_one_batch(pool, checkpoint, prompts, inputs):
    plain = pool.get(checkpoint, **EMBEDS)
    expected = greedy(plain, inputs)
    of_token_ids = plain.greedy(prompts, 32)
    assert all(expected[i] != of_token_ids[i] for i in (1, 3, 5)), "embeddings change nothing"
    engine = pool.layerskip(checkpoint, 3, 4, **EMBEDS)
    with engine.counting() as counts:
        assert greedy(engine, inputs) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused == 0
    # Again, from the prefix cache.
    with engine.counting() as counts:
        assert greedy(engine, inputs) == expected
    counts.assert_speculated()
