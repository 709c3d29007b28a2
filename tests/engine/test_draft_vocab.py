# SPDX-License-Identifier: Apache-2.0
"""Drafts from a draft vocabulary: of its tokens alone, and no token changes.

Catches ids that are not mapped back, a draft distribution that is not the one that was
sampled from, and rows of the LM head that are left behind by new weights.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from itertools import chain

import pytest
import torch
from checkpoints import with_config
from vllm import SamplingParams

MAX_TOKENS = 30
VOCAB_SIZE = 1024
SAMPLE_METHODS = ["greedy", "probabilistic"]


@pytest.fixture(scope="module")
def expected(pool, checkpoint, prompts):
    return pool.get(checkpoint).greedy(prompts[:3], max_tokens=MAX_TOKENS)


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
    """The tokens that rows which may draft were given."""
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
        assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    assert counts.acceptance_length > 1.3
    assert len(drafts) >= counts.num_draft_tokens
    assert len(set(drafts)) > 5
    assert set(drafts) <= token_ids


@pytest.mark.parametrize("method", SAMPLE_METHODS)
def test_without_the_tokens_of_the_output_no_draft_is_accepted(
    pool, checkpoint, prompts, expected, vocabs, method
):
    path, token_ids = vocabs["uncommon"]
    spec = {"draft_vocab": path, "draft_sample_method": method}
    engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
    with engine.counting() as counts, drafted(engine) as drafts:
        assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
    assert counts.num_draft_tokens > 100
    assert counts.num_accepted_tokens == 0
    assert set(drafts) <= token_ids


@pytest.mark.parametrize("method", SAMPLE_METHODS)
def test_a_vocabulary_of_all_tokens_drafts_what_none_drafts(
    pool, checkpoint, prompts, expected, vocabs, method
):
    runs = []
    for draft_vocab in ("none", vocabs["all"][0]):
        spec = {"draft_vocab": draft_vocab, "draft_sample_method": method}
        engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
        params = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True, seed=5)
        engine.reset_prefix_cache()
        with engine.counting() as counts, drafted(engine) as drafts:
            assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
            sampled = engine.generate(prompts[:3], params)
        counts.assert_speculated()
        runs.append((drafts, counts.drafts, sampled))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("draft_vocab", ["none", "common"])
def test_local_argmax_reduction_drafts_the_same(
    pool, checkpoint, prompts, expected, vocabs, draft_vocab
):
    runs = []
    for reduction in (False, True):
        spec = {
            "draft_vocab": vocabs[draft_vocab][0] if draft_vocab in vocabs else draft_vocab,
            "use_local_argmax_reduction": reduction,
        }
        engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
        engine.reset_prefix_cache()
        with engine.counting() as counts, drafted(engine) as drafts:
            assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
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

    from vllm_layerskip.draft_head import DraftHead

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


def test_a_checkpoint_brings_its_draft_vocabulary(
    pool, checkpoint, prompts, expected, vocabs, tmp_path
):
    path, token_ids = vocabs["common"]
    block = {"exit_layer": 3, "num_speculative_tokens": 4, "draft_vocab": "common.json"}
    model = with_config(checkpoint, tmp_path / "m", layerskip=block)
    (model / "common.json").symlink_to(path)
    engine = pool.get(model, speculative_config={"method": "layerskip"})
    with engine.counting() as counts, drafted(engine) as drafts:
        assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == expected
    counts.assert_speculated()
    assert set(drafts) <= token_ids


def test_new_weights_reach_the_draft_head(pool, checkpoint, prompts, vocabs, tmp_path):
    """vLLM's reload_weights: the rows are those of the new weights from the next step on."""
    other = scaled_embeddings(checkpoint, tmp_path / "other")
    new_expected = pool.get(other).greedy(prompts[:3], max_tokens=MAX_TOKENS)
    spec = {"draft_vocab": vocabs["all"][0]}
    engine = pool.layerskip(checkpoint, 3, 3, spec=spec)
    head = engine.runner.speculator.draft_head
    address = head.lm_head.weight.data_ptr()
    old = head.lm_head.weight.clone()
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    engine.reset_prefix_cache()
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], max_tokens=MAX_TOKENS) == new_expected
    counts.assert_speculated()
    assert head.lm_head.weight.data_ptr() == address
    new = engine.runner.model.lm_head.weight
    assert torch.equal(head.lm_head.weight, new)
    assert not torch.equal(head.lm_head.weight, old)


def scaled_embeddings(checkpoint, folder):
    """The checkpoint with every token embedding scaled; the tied LM head changes with them."""
    from safetensors.torch import load_file, save_file

    model = with_config(checkpoint, folder)
    weights = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    embedding = weights["model.embed_tokens.weight"]
    scale = 1 + 0.1 * torch.rand(len(embedding), 1, generator=generator)
    weights["model.embed_tokens.weight"] = (embedding.float() * scale).to(embedding.dtype)
    (model / "model.safetensors").unlink()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model
