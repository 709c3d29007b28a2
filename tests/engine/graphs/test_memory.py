# SPDX-License-Identifier: Apache-2.0
"""No second model and no second KV cache: what LayerSkip adds is the exit-state buffer."""

from __future__ import annotations

import logging

import pytest


def parameters(engine):
    named = engine.runner.model.named_parameters(remove_duplicate=False)
    return [(name, parameter.shape) for name, parameter in named]


def test_weights_and_kv_cache_are_plain_vllms(pool, checkpoint, prompts):
    plain, engine = pool.get(checkpoint), pool.layerskip(checkpoint, 3, 5)
    assert parameters(engine) == parameters(plain)
    assert engine.runner.speculator.model is engine.runner.model
    assert engine.runner.speculator.draft_attn_layer_names == set()
    ours, theirs = engine.runner, plain.runner
    assert [c.shape for c in ours.kv_caches] == [c.shape for c in theirs.kv_caches]
    assert ours.kv_cache_config.num_blocks == theirs.kv_cache_config.num_blocks
    groups = [group.layer_names for group in ours.kv_cache_config.kv_cache_groups]
    assert groups == [group.layer_names for group in theirs.kv_cache_config.kv_cache_groups]


@pytest.mark.parametrize("num_speculative_tokens", [1, 5])
def test_exit_state_buffer_is_as_large_as_stated(pool, checkpoint, num_speculative_tokens):
    engine = pool.layerskip(checkpoint, 3, num_speculative_tokens)
    states = engine.runner.model_state.draft_state.exit_states
    hidden_size, max_num_seqs, bytes_each = 160, 4, 4
    assert states.num_bytes == max_num_seqs * num_speculative_tokens * 2 * hidden_size * bytes_each


def test_one_line_at_start_says_what_runs(pool, checkpoint, caplog):
    logger = logging.getLogger("vllm.layerskip.speculator")
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    try:
        engine = pool.layerskip(checkpoint, 3, 6, spec={"reuse_exit_states": False})
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.NOTSET)
    # The handler also hears the root logger; the same record may come twice.
    lines = {id(record): record.getMessage() for record in caplog.records}.values()
    (line,) = [line for line in lines if line.startswith("LayerSkip")]
    for part in (
        "on vLLM 0.",
        "layers 0..2 of 12",
        "exit_layer 3",
        "6 speculative tokens",
        "reuse off",
        f"{engine.runner.model_state.draft_state.exit_states.num_bytes} bytes",
    ):
        assert part in line


def test_plain_engines_keep_vllms_own_classes(pool, checkpoint):
    pool.layerskip(checkpoint, 3, 5)
    runner = pool.get(checkpoint).runner
    assert type(runner.model).__name__ == "LlamaForCausalLM"
    assert type(runner.model_state).__name__ == "DefaultModelState"
    assert runner.speculator is None
