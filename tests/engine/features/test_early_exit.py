# SPDX-License-Identifier: Apache-2.0
"""Catch an early exit that serves other layers than the first E, or that keeps the rest in memory.

The references are transformers' model, cut in place, and a checkpoint that really ends there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import load_reference, random_llama
from processes import run_script
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from benchmarks.engines.cut_checkpoint import write_cut_checkpoint
from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES
from vllm_layerskip.models.early_exit import layer_of

NUM_LAYERS, HIDDEN_SIZE, EXIT_LAYER, NUM_TOKENS = 12, 160, 3, 24


@pytest.fixture(scope="module")
def cut_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The embedded checkpoint's first layers as a checkpoint of their own."""
    return write_cut_checkpoint(checkpoint, EXIT_LAYER, tmp_path_factory.mktemp("cut") / "model")


def early_exit(pool, model, exit_layer=EXIT_LAYER, **settings):
    return pool.get(model, hf_overrides={"early_exit_layer": exit_layer}, **settings)


@torch.no_grad()
def truncated_greedy(model, exit_layer, prompts):
    """transformers, its upper layers removed: no cache, no code of vLLM's."""
    model.model.layers = model.model.layers[:exit_layer]
    continuations = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            logits = model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        continuations.append(ids[len(prompt) :])
    return continuations


@pytest.fixture(scope="module", autouse=True)
def loads():
    """What each model of the module was built with and loaded, by its class.

    Recorded while it loads: on a CPU vLLM moves weights out of the parameters afterwards.
    """
    original, loads = LlamaForCausalLM.load_weights, {}

    def load_weights(self, weights):
        num_bytes = sum(p.numel() * p.element_size() for p in self.parameters())
        names = original(self, weights)
        key = type(self).__name__, self.config.num_hidden_layers, self.config.hidden_size
        loads[key] = num_bytes, names
        return names

    LlamaForCausalLM.load_weights = load_weights
    yield loads
    LlamaForCausalLM.load_weights = original


def test_tokens_are_those_of_the_truncated_model(pool, checkpoint, cut_checkpoint, prompts):
    tokens = early_exit(pool, checkpoint).greedy(prompts, NUM_TOKENS)
    assert tokens == truncated_greedy(load_reference(checkpoint), EXIT_LAYER, prompts)
    assert tokens == pool.get(cut_checkpoint).greedy(prompts, NUM_TOKENS)
    assert tokens != pool.get(checkpoint).greedy(prompts, NUM_TOKENS), "nothing was cut"


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_the_whole_range_of_a_model_with_an_untied_head(pool, random_checkpoint, exit_layer):
    prompts = [[5, 9, 12], [3, 60, 17, 33, 8, 21, 40]]
    tokens = early_exit(pool, random_checkpoint, exit_layer).greedy(prompts, NUM_TOKENS)
    assert tokens == truncated_greedy(load_reference(random_checkpoint), exit_layer, prompts)


def test_upper_layers_have_neither_weights_nor_a_kv_cache(pool, checkpoint, cut_checkpoint, loads):
    engine, plain = early_exit(pool, checkpoint), pool.get(checkpoint)
    pool.get(cut_checkpoint)
    num_bytes, names = loads["EarlyExitLlamaForCausalLM", EXIT_LAYER, HIDDEN_SIZE]
    assert (num_bytes, names) == loads["LlamaForCausalLM", EXIT_LAYER, HIDDEN_SIZE]
    num_plain_bytes, plain_names = loads["LlamaForCausalLM", NUM_LAYERS, HIDDEN_SIZE]
    assert names == {name for name in plain_names if layer_of(name) < EXIT_LAYER}
    per_layer = (num_plain_bytes - num_bytes) / (NUM_LAYERS - EXIT_LAYER)
    assert per_layer * EXIT_LAYER < num_bytes < num_plain_bytes / 2

    kv_cache_config = engine.scheduler.kv_cache_config
    (group,) = kv_cache_config.kv_cache_groups
    assert sorted(map(extract_layer_index, group.layer_names)) == list(range(EXIT_LAYER))
    # The same memory holds more tokens: 3 layers share it rather than 12.
    num_plain_blocks = plain.scheduler.kv_cache_config.num_blocks
    assert kv_cache_config.num_blocks // (NUM_LAYERS // EXIT_LAYER) == num_plain_blocks


def test_a_prompt_from_the_prefix_cache_gets_the_same_tokens(pool, checkpoint, prompts):
    engine = early_exit(pool, checkpoint)
    engine.reset_prefix_cache()
    expected = engine.greedy([prompts[2]], NUM_TOKENS)
    hits = []
    observe = engine.scheduler.kv_cache_manager.get_computed_blocks

    def get_computed_blocks(request):
        found = observe(request)
        hits.append(found[1])
        return found

    engine.scheduler.kv_cache_manager.get_computed_blocks = get_computed_blocks
    try:
        assert engine.greedy([prompts[2]], NUM_TOKENS) == expected
    finally:
        del engine.scheduler.kv_cache_manager.get_computed_blocks
    assert hits[0] > 0


TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
INTERLEAVED = ["sliding_attention", "full_attention"] * 2
FAMILIES = {
    "Qwen2ForCausalLM": {"model_type": "qwen2"},
    "MistralForCausalLM": {"model_type": "mistral"},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "tie_word_embeddings": True},
    "Gemma2ForCausalLM": {
        "model_type": "gemma2",
        "layer_types": INTERLEAVED,
        "sliding_window": 16,
        "final_logit_softcapping": 3.0,
        "initializer_range": 0.08,
    },
}


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name == "Qwen2ForCausalLM" else [pytest.mark.slow])
        for name in FAMILIES
        if name in SUPPORTED_ARCHITECTURES
    ],
)
def test_every_family_is_cut_by_vllms_own_class(pool, tmp_path_factory, architecture):
    options = {**TINY, **FAMILIES[architecture]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**options)
    folder = tmp_path_factory.mktemp(architecture) / "model"
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    prompts = [[5, 9, 12], [(7 * i) % 60 + 3 for i in range(40)]]
    engine = early_exit(pool, folder, 3)
    assert type(engine.runner.model).__name__ == f"EarlyExit{architecture}"
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert engine.greedy(prompts, NUM_TOKENS) == truncated_greedy(reference, 3, prompts)


def generate_from_flags(checkpoint, prompts, *flags, **environment):
    """``(tokens, log)`` of an engine in processes of its own, set up by flags."""
    (tokens,), log = run_script(
        "generate_from_flags.py",
        json.dumps(prompts), str(NUM_TOKENS),
        "--model", str(checkpoint),
        "--dtype", "float32",
        "--max-model-len", "256",
        "--max-num-seqs", "4",
        "--kv-cache-memory-bytes", str(16 << 20),
        "--enforce-eager",
        *flags,
        environment={"VLLM_LOGGING_LEVEL": "INFO", **environment},
    )  # fmt: skip
    return tokens, log


@pytest.mark.slow
def test_two_ranks_serve_the_same_tokens(pool, checkpoint, prompts):
    tokens, log = generate_from_flags(
        checkpoint, prompts[:4],
        "--early-exit-layer", str(EXIT_LAYER),
        "--tensor-parallel-size", "2",
        "--distributed-executor-backend", "mp",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    assert tokens == early_exit(pool, checkpoint).greedy(prompts[:4], NUM_TOKENS)
    assert log.count("LayerSkip early exit") == 1
    assert "layers 0..2 of 12 are served, without verification (early_exit_layer 3)." in log
    assert "Output is lossy" in log


@pytest.mark.slow
@pytest.mark.parametrize("v2", ["0", "1"])
def test_both_model_runners_serve_the_same_tokens(pool, checkpoint, prompts, v2):
    tokens, log = generate_from_flags(
        checkpoint, prompts[:4],
        "--early-exit-layer", str(EXIT_LAYER),
        VLLM_USE_V2_MODEL_RUNNER=v2,
    )  # fmt: skip
    assert tokens == early_exit(pool, checkpoint).greedy(prompts[:4], NUM_TOKENS)


@pytest.mark.slow
def test_the_compiled_model_serves_the_same_tokens(pool, checkpoint, prompts):
    engine = early_exit(pool, checkpoint, enforce_eager=False)
    assert engine.greedy(prompts, NUM_TOKENS) == early_exit(pool, checkpoint).greedy(
        prompts, NUM_TOKENS
    )


@pytest.mark.slow
def test_vllm_bench_and_serve_take_the_flag(checkpoint, tmp_path):
    vllm = Path(sys.executable).with_name("vllm")
    flags = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    bench = subprocess.run(
        [
            # Its prompts are ids below 10000.
            vllm, "bench", "latency", "--model", random_llama(tmp_path / "m", vocab_size=10_000),
            "--skip-tokenizer-init", *flags,
            "--kv-cache-memory-bytes", str(16 << 20),
            "--early-exit-layer", str(EXIT_LAYER),
            "--input-len", "8", "--output-len", "4", "--batch-size", "1",
            "--num-iters", "1", "--num-iters-warmup", "1",
        ],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    log = bench.stdout + bench.stderr
    assert bench.returncode == 0, log[-6000:]
    assert log.count("LayerSkip early exit: layers 0..2 of 4") == 1
    refused = subprocess.run(
        [
            vllm, "serve", checkpoint, *flags,
            "--early-exit-layer", "3", "--speculative-model", "[self]", "--spec-tokens", "2",
        ],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    log = refused.stdout + refused.stderr
    assert "early_exit_layer=3 (--early-exit-layer) serves the first layers alone" in log
    assert "'model': '[self]'" in log
