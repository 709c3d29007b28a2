# SPDX-License-Identifier: Apache-2.0
"""Drafts come from the draft vocabulary alone, and output tokens do not change.

Catches ids that are not mapped back, a draft distribution that is not the one that was
sampled from, and rows of the LM head that stay old when new weights arrive.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from itertools import chain

import pytest
import torch
from checkpoints import random_llama
from vllm import SamplingParams

from vllm_layerskip.worker.draft_head import DraftHead

MAX_TOKENS = 24
VOCAB_SIZE = 1024
VOCAB_SIZE_OF_RANDOM = 64
PROMPTS_OF_RANDOM = [[0, *range(3, 12)], [0, *range(30, 50)]]
SAMPLE_METHODS = ["greedy", "probabilistic"]


@pytest.fixture(scope="module")
def expected(pool, checkpoint, prompts):
    return pool.get(checkpoint).greedy(prompts[:2], max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def vocabs(expected, tmp_path_factory):
    """Files of the more frequent half of the output's tokens, of all others, and of all."""
    common = [token for token, _ in Counter(chain(*expected)).most_common()]
    sets = {
        "common": common[: len(common) // 2],
        "uncommon": sorted(set(range(VOCAB_SIZE)) - set(common)),
        "all": list(range(VOCAB_SIZE)),
    }
    folder = tmp_path_factory.mktemp("vocabs")
    for name, token_ids in sets.items():
        (folder / name).write_text(json.dumps(token_ids))
    return {name: (str(folder / name), set(token_ids)) for name, token_ids in sets.items()}


@contextlib.contextmanager
def drafted(engine):
    """The tokens drafted in rows that may draft."""
    speculator = engine.runner.speculator
    sample_draft, tokens = speculator.sample_draft, []

    def observe(hidden_states, positions, idx_mapping, *args, **kwargs):
        sampled = sample_draft(hidden_states, positions, idx_mapping, *args, **kwargs)
        tokens.extend(sampled[idx_mapping >= 0].tolist())
        return sampled

    speculator.sample_draft = observe
    try:
        yield tokens
    finally:
        del speculator.sample_draft


@pytest.mark.parametrize("method", SAMPLE_METHODS)
def test_drafts_are_of_the_vocabulary_and_tokens_are_plain_vllms(
    pool, checkpoint, prompts, expected, vocabs, method
):
    path, token_ids = vocabs["common"]
    spec = {"draft_vocab": path, "draft_sample_method": method}
    engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
    with engine.counting() as counts, drafted(engine) as drafts:
        assert engine.greedy(prompts[:2], max_tokens=MAX_TOKENS) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    assert counts.acceptance_length > 1.3
    assert len(drafts) >= counts.num_draft_tokens
    assert len(set(drafts)) > 5
    assert set(drafts) <= token_ids


def test_without_the_tokens_of_the_output_no_draft_is_accepted(
    pool, checkpoint, prompts, expected, vocabs
):
    path, token_ids = vocabs["uncommon"]
    engine = pool.layerskip(checkpoint, 3, 4, spec={"draft_vocab": path})
    with engine.counting() as counts, drafted(engine) as drafts:
        assert engine.greedy(prompts[:2], max_tokens=MAX_TOKENS) == expected
    assert counts.num_draft_tokens > 80
    assert counts.num_accepted_tokens == 0
    assert set(drafts) <= token_ids


@pytest.mark.parametrize("method", SAMPLE_METHODS)
def test_a_vocabulary_of_all_tokens_drafts_what_none_drafts(
    pool, checkpoint, prompts, expected, vocabs, method
):
    temperature = 0.8 if method == "probabilistic" else 0
    params = SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, ignore_eos=True, seed=5)
    runs = []
    for draft_vocab in ("none", vocabs["all"][0]):
        spec = {"draft_vocab": draft_vocab, "draft_sample_method": method}
        engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
        engine.reset_prefix_cache()
        with engine.counting() as counts, drafted(engine) as drafts:
            tokens = engine.generate(prompts[:2], params)
        counts.assert_speculated()
        runs.append((tokens, drafts, counts.drafts))
    assert runs[0] == runs[1]
    assert temperature > 0 or tokens == expected


def test_local_argmax_reduction_drafts_the_same(pool, checkpoint, prompts, expected):
    runs = []
    for reduction in (False, True):
        spec = {"use_local_argmax_reduction": reduction}
        engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
        engine.reset_prefix_cache()
        with engine.counting() as counts, drafted(engine) as drafts:
            assert engine.greedy(prompts[:2], max_tokens=MAX_TOKENS) == expected
        counts.assert_speculated()
        runs.append((drafts, counts.drafts))
    assert runs[0] == runs[1]


def test_the_rejection_sampler_gets_the_distribution_that_was_sampled_from(
    pool, checkpoint, prompts, vocabs
):
    path, token_ids = vocabs["common"]
    spec = {"draft_vocab": path, "draft_sample_method": "probabilistic"}
    engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
    speculator = engine.runner.speculator
    inside = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    inside[sorted(token_ids)] = True
    seen = []
    compute = speculator.model.compute_logits

    def observe(hidden_states, *_):
        full = compute(hidden_states.clone())
        logits = DraftHead.compute_logits(speculator.draft_head, hidden_states)
        seen.append((full, logits.clone()))
        return logits

    speculator.draft_head.compute_logits = observe
    params = SamplingParams(temperature=0.8, max_tokens=12, ignore_eos=True, seed=3)
    try:
        with engine.counting() as counts:
            engine.generate(prompts[:1], params)
    finally:
        del speculator.draft_head.compute_logits
    counts.assert_speculated()
    for full, logits in seen:
        assert logits[:, ~inside].eq(-float("inf")).all()
        torch.testing.assert_close(logits[:, inside], full[:, inside], rtol=1e-5, atol=1e-5)
    # One request at a time has one slot; the last step's K passes are in the cache.
    cached = [step for slot in speculator.draft_logits for step in slot]
    for _, logits in seen[-4:]:
        assert any(torch.equal(logits[0], step) for step in cached)


def test_the_memory_is_as_large_as_stated(pool, checkpoint, vocabs):
    path, token_ids = vocabs["common"]
    for method in SAMPLE_METHODS:
        spec = {"draft_vocab": path, "draft_sample_method": method}
        engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
        head = engine.runner.speculator.draft_head
        num_rows = -(-len(token_ids) // 64) * 64  # vLLM pads vocabularies.
        full_logits = 4 * 4 * VOCAB_SIZE if method == "probabilistic" else 0
        assert head.num_bytes == num_rows * 160 * 4 + len(token_ids) * 8 + full_logits
        plain = dict(pool.get(checkpoint).runner.model.named_parameters())
        assert plain.keys() == dict(engine.runner.model.named_parameters()).keys()


def test_new_weights_reach_the_draft_head(pool, tmp_path):
    """vLLM's reload_weights. Later layers add nothing, so only old rows make a draft wrong."""
    models = [random_llama(tmp_path / str(seed), identity_from=2, seed=seed) for seed in (0, 1)]
    (tmp_path / "ids").write_text(json.dumps(list(range(VOCAB_SIZE_OF_RANDOM))))
    engine = pool.layerskip(models[0], 2, 3, spec={"draft_vocab": str(tmp_path / "ids")})
    head = engine.runner.speculator.draft_head
    address, rows = head.lm_head.weight.data_ptr(), []
    for model in models:
        expected = pool.get(model).greedy(PROMPTS_OF_RANDOM, max_tokens=MAX_TOKENS)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
        engine.reset_prefix_cache()
        with engine.counting() as counts:
            assert engine.greedy(PROMPTS_OF_RANDOM, max_tokens=MAX_TOKENS) == expected
        counts.assert_speculated()
        assert counts.num_accepted_tokens == counts.num_draft_tokens
        assert head.lm_head.weight.data_ptr() == address
        rows.append(head.lm_head.weight.clone())
    assert not torch.equal(*rows)
