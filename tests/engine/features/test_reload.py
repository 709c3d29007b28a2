# SPDX-License-Identifier: Apache-2.0
"""Weights that are loaded again, and memory that sleep mode discards (docs/tests.md, T18).

Catches a copy of weights, or a buffer with content of its own, that does not come back.
"""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import random_llama
from engines import ON_GPU

MAX_TOKENS = 32
PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]


@pytest.fixture(scope="module")
def draft_vocab(tmp_path_factory):
    file = tmp_path_factory.mktemp("ids") / "ids.json"
    file.write_text(json.dumps(list(range(0, 1024, 2))))
    return str(file)


def speculate(engine, prompts):
    with engine.counting() as counts:
        tokens = engine.greedy(prompts, MAX_TOKENS)
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    return tokens, counts.drafts


def reload_weights(engine, **arguments):
    engine.llm.collective_rpc("reload_weights", kwargs=arguments)
    engine.reset_prefix_cache()


@pytest.mark.parametrize("with_draft_vocab", [False, True], ids=["whole-vocab", "draft-vocab"])
def test_reloaded_weights_change_neither_tokens_nor_drafts(
    pool, checkpoint, prompts, draft_vocab, with_draft_vocab
):
    spec = {"draft_vocab": draft_vocab} if with_draft_vocab else {}
    engine = pool.layerskip(checkpoint, 3, 4, spec=spec)
    before = speculate(engine, prompts[:3])
    assert before[0] == pool.get(checkpoint).greedy(prompts[:3], MAX_TOKENS)
    model = engine.runner.model
    changes = model.num_weight_changes
    # vLLM takes it for a draft model of its own, and must not load it a second time.
    assert engine.runner.get_draft_model() is model
    reload_weights(engine)
    assert model.num_weight_changes > changes
    engine.reset_prefix_cache()
    assert speculate(engine, prompts[:3]) == before


def test_reloading_other_weights_gives_a_fresh_engines_tokens(pool, tmp_path):
    first, second = (
        random_llama(tmp_path / name, identity_from=identity_from, seed=seed)
        for name, identity_from, seed in (("first", None, 0), ("second", 2, 1))
    )
    expected = [pool.get(model).greedy(PROMPTS, MAX_TOKENS) for model in (first, second)]
    assert expected[0] != expected[1]
    engine = pool.layerskip(first, 2, 3)
    assert engine.greedy(PROMPTS, MAX_TOKENS) == expected[0]
    reload_weights(engine, weights_path=str(second))
    with engine.counting() as counts:
        assert engine.greedy(PROMPTS, MAX_TOKENS) == expected[1]
    # The second's late layers add nothing: a draft from any old weight would be rejected.
    counts.assert_speculated()
    assert counts.num_accepted_tokens == counts.num_draft_tokens


def test_weights_that_change_under_running_requests(pool, tmp_path):
    """The step after the change must not start from the other weights' exit states."""
    first, second = (random_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    tokens = {}
    for reuse in (True, False):
        engine = pool.layerskip(first, 2, 3, spec={"reuse_exit_states": reuse})
        reload_weights(engine, weights_path=str(first))
        engine.start("request", PROMPTS[1], MAX_TOKENS)
        for _ in range(3):
            engine.step()
        full = engine.verify_stats().num_verify_steps_full
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        engine.step()
        assert engine.verify_stats().num_verify_steps_full == full + 1
        tokens[reuse] = engine.run_to_end()
    assert tokens[True] == tokens[False]


@torch.no_grad()
def discard(runner):
    """Do what sleep level 2 does: lose all that lies in the pools of weights and KV cache.

    vLLM makes those pools while it loads the model and its KV cache. It saves the model's
    buffers itself.
    """
    lost = [*runner.model.parameters(), *runner.kv_caches]
    state = runner.model_state
    lost += [state.idx_mapping, state.query_start_loc, state.slot_mappings]
    lost.append(runner.model._late_stage_inputs)
    head = runner.speculator.draft_head
    if head is not None:
        lost += [*head.lm_head.parameters(), head.token_ids]
        lost += [] if head._full_logits is None else [head._full_logits]
    for tensor in lost:
        # No NaN: attention multiplies what it masks by zero, with plain decoding as well.
        tensor.fill_(7.5 if tensor.is_floating_point() else 0x5A5A)


@pytest.mark.parametrize(
    "sampling", [{}, {"draft_sample_method": "probabilistic"}], ids=["greedy", "probabilistic"]
)
def test_discarded_memory_is_made_anew(pool, checkpoint, prompts, draft_vocab, sampling):
    engine = pool.layerskip(checkpoint, 3, 4, spec={"draft_vocab": draft_vocab, **sampling})
    before = speculate(engine, prompts[:3])
    engine.reset_prefix_cache()
    # vLLM restores a model's buffers by itself. The ids must be one: if weights then came without
    # ``load_weights``, lost ids would be out of range in the next draft.
    buffers = {buffer.data_ptr() for buffer in engine.runner.model.buffers()}
    assert engine.runner.speculator.draft_head.token_ids.data_ptr() in buffers
    discard(engine.runner)
    reload_weights(engine)
    assert speculate(engine, prompts[:3]) == before


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="vLLM has no sleep mode on a CPU")
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(pool, checkpoint, prompts, draft_vocab, level):
    engine = pool.layerskip(
        checkpoint, 3, 4, spec={"draft_vocab": draft_vocab}, enable_sleep_mode=True
    )
    before = speculate(engine, prompts[:3])
    engine.llm.sleep(level=level)
    if level == 1:
        engine.llm.wake_up()
    else:
        engine.llm.wake_up(tags=["weights"])
        engine.llm.collective_rpc("reload_weights")
        engine.llm.wake_up(tags=["kv_cache"])
    engine.reset_prefix_cache()
    assert speculate(engine, prompts[:3]) == before
