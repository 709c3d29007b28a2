# SPDX-License-Identifier: Apache-2.0
"""Long and mixed prompts of a real model: chunks of prefill, batches, and the prefix cache.

Catches positions, chunks and K/V that only go wrong past a few hundred tokens, where a checkpoint
of 512 positions ends.
"""

from __future__ import annotations

import inspect
import textwrap

import pytest
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

NUM_LONG = 6000
LENGTHS = (10, 17, 32, 64, 130, 260, 520, 1500)
CHUNK = 512
BLOCK_SIZE = 32
SETTINGS = {
    "max_model_len": 8192,
    "max_num_seqs": 8,
    "max_num_batched_tokens": CHUNK,
    "kv_cache_memory_bytes": 448 << 20,
    "block_size": BLOCK_SIZE,
}


@pytest.fixture(scope="module")
def text(tokenizer):
    """Token ids of Python that every machine has."""
    import argparse
    import typing

    ids = tokenizer("".join(map(inspect.getsource, (textwrap, argparse, typing))))["input_ids"]
    assert len(ids) > NUM_LONG + sum(LENGTHS)
    return ids


@pytest.fixture(scope="module")
def plain(pool, example):
    return pool.get(example, **SETTINGS)


@pytest.fixture(scope="module")
def engine(pool, example):
    """As the folder's config.json says."""
    return pool.get(example, speculative_config={"method": "layerskip"}, **SETTINGS)


def test_a_batch_of_mixed_lengths(plain, engine, text):
    """More tokens than a step takes: prefill of some rows beside decodes of others."""
    prompts, start = [], NUM_LONG
    for length in LENGTHS:
        prompts.append(text[start : start + length])
        start += length
    expected = plain.greedy(prompts, max_tokens=16)
    with engine.counting() as counts:
        assert engine.greedy(prompts, max_tokens=16) == expected
    counts.assert_speculated()
    assert counts.acceptance_length > 2


def answer_and_hits(engine, prompt, max_tokens):
    """Tokens, and how many of the prompt came from the prefix cache."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    inputs = TokensPrompt(prompt_token_ids=prompt)
    (output,) = engine.llm.generate([inputs], params, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def test_two_turns_of_six_thousand_tokens(plain, engine, text):
    """A long prompt in many chunks; then the same with its answer and a second question."""
    first = text[:NUM_LONG]
    assert NUM_LONG > 10 * CHUNK
    plain.reset_prefix_cache()
    engine.reset_prefix_cache()
    answer, _ = answer_and_hits(plain, first, 48)
    with engine.counting() as counts:
        assert answer_and_hits(engine, first, 48) == (answer, 0)
    counts.assert_speculated()
    assert counts.acceptance_length > 2
    second = first + answer + text[NUM_LONG : NUM_LONG + 40]
    _, num_cached = expected = answer_and_hits(plain, second, 24)
    with engine.counting() as counts:
        assert answer_and_hits(engine, second, 24) == expected
    counts.assert_speculated()
    assert num_cached > NUM_LONG, "blocks that were filled while drafting are cached"
