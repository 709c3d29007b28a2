# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: in every layer, or interleaved with full attention (docs/tests.md, T21).

vLLM keeps a KV cache group for each kind of layer and frees the blocks that a window has left
behind, also while drafts are in the blocks in front. Catches a draft pass with the slots of
another group, one that reads a freed block, and a window that counts draft positions.
"""

from __future__ import annotations

from collections import Counter

import pytest
from engines import ON_GPU, EnginePool
from families import WINDOW, random_checkpoint
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

from vllm_layerskip.worker.draft_graphs import DraftCudaGraphManager

BLOCK_SIZE = 32
PROMPTS = [[0, *(3 + (7 * i) % 50 for i in range(length))] for length in (4, 37, 70, 95)]

# (architecture, options, exit layer): what the early and the late stage are made of.
UNIFORM = ("MistralForCausalLM", {"sliding_window": WINDOW}, 2)
UNIFORM_LAYER_TYPES = (
    "Qwen2ForCausalLM",
    {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    2,
)
FUSED = ("Phi3ForCausalLM", {"sliding_window": WINDOW}, 2)
BOTH_IN_BOTH = ("Gemma3ForCausalLM", {}, 2)
EARLY_WINDOW_ONLY = ("Gemma3ForCausalLM", {}, 1)
EARLY_FULL_ONLY = (
    "LlamaForCausalLM",
    {
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
    },
    2,
)
MODELS = {
    "uniform": UNIFORM,
    "uniform-layer-types": UNIFORM_LAYER_TYPES,
    "uniform-fused": FUSED,
    "interleaved": BOTH_IN_BOTH,
    "early-window-only": EARLY_WINDOW_ONLY,
    "early-full-only": EARLY_FULL_ONLY,
}

pytestmark = pytest.mark.usefixtures("many_small_engines")


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    made = {}

    def get(name):
        architecture, options, exit_layer = MODELS[name]
        key = repr((architecture, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("window") / "model"
            made[key] = random_checkpoint(folder, architecture, **options)
        return made[key], exit_layer

    return get


def num_freed_blocks(engine) -> int:
    """Entries of running requests' block tables that point to no block any more."""
    managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    return sum(
        block.is_null
        for manager in managers
        for blocks in manager.req_to_blocks.values()
        for block in blocks
    )


def run(engine, prompts, max_tokens):
    """(tokens, most freed blocks seen at once)"""
    for index, prompt in enumerate(prompts):
        engine.start(str(index), prompt, max_tokens)
    tokens, freed = {}, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        tokens.update(engine.step())
        freed = max(freed, num_freed_blocks(engine))
    return [tokens[str(index)] for index in range(len(prompts))], freed


def has_window(engine, layer: int) -> bool:
    (attn,) = [
        module.attn
        for name, module in engine.runner.model.named_modules()
        if name.endswith(f"layers.{layer}.self_attn")
    ]
    return attn.sliding_window is not None


@pytest.mark.parametrize(
    "name",
    [
        "uniform",
        "interleaved",
        "early-window-only",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("uniform-layer-types", "uniform-fused", "early-full-only")
        ),
    ],
)
def test_generation_past_the_window(pool: EnginePool, checkpoint_of, name):
    model, exit_layer = checkpoint_of(name)
    settings = {"block_size": BLOCK_SIZE}
    plain = pool.get(model, **settings)
    expected, freed = run(plain, PROMPTS, 70)
    assert freed > 0, "vLLM freed no block behind the window"
    engine = pool.layerskip(model, exit_layer, 4, **settings)
    windows = [has_window(engine, layer) for layer in range(4)]
    assert any(windows)
    for reuse in (True, False):
        engine.vllm_config.speculative_config.reuse_exit_states = reuse
        engine.reset_prefix_cache()
        with engine.counting() as counts:
            tokens, freed = run(engine, PROMPTS, 70)
        assert tokens == expected
        assert freed > 0
        counts.assert_speculated()
        assert counts.num_accepted_tokens < counts.num_draft_tokens
        assert (counts.num_verify_steps_reused > 0) == reuse
    engine.vllm_config.speculative_config.reuse_exit_states = True


def test_preempted_requests(pool, checkpoint_of):
    model, exit_layer = checkpoint_of("interleaved")
    roomy = {"block_size": BLOCK_SIZE, "enable_prefix_caching": False, "max_model_len": 192}
    plain = pool.get(model, **roomy)
    expected = [plain.greedy([prompt], max_tokens=70)[0] for prompt in PROMPTS]
    tight = {**roomy, "num_gpu_blocks_override": 16}
    engine = pool.layerskip(model, exit_layer, 4, **tight)
    with engine.counting() as counts:
        assert engine.greedy(PROMPTS, max_tokens=70) == expected
    assert counts.num_preemptions > 0, "nothing was preempted"
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0


def cached_tokens(engine, prompts, max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    results = []
    for prompt in prompts:
        (output,) = engine.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False
        )
        results.append((list(output.outputs[0].token_ids), output.num_cached_tokens))
    return results


@pytest.mark.parametrize("name", [pytest.param("uniform", marks=pytest.mark.slow), "interleaved"])
def test_prefix_cache(pool, checkpoint_of, name):
    """Hits equal plain vLLM's, also on blocks that were filled while drafting."""
    model, exit_layer = checkpoint_of(name)
    # By default vLLM keeps only a prompt's last blocks of a window.
    settings = {"block_size": BLOCK_SIZE, "prefix_cache_retention_interval": BLOCK_SIZE}
    plain = pool.get(model, **settings)
    plain.reset_prefix_cache()
    first = PROMPTS[2]
    ((answer, _),) = cached_tokens(plain, [first], 60)
    sequence = [first, first + answer + [5, 6, 7], first, first + answer + [8]]
    plain.reset_prefix_cache()
    expected = cached_tokens(plain, sequence, 40)
    engine = pool.layerskip(model, exit_layer, 4, **settings)
    engine.reset_prefix_cache()
    with engine.counting() as counts:
        assert cached_tokens(engine, sequence, 40) == expected
    counts.assert_speculated()
    hits = [cached for _, cached in expected]
    assert hits[1] >= 3 * BLOCK_SIZE
    assert all(hits[1:])


@pytest.mark.parametrize("name", [pytest.param("uniform", marks=pytest.mark.slow), "interleaved"])
def test_chunked_prefill(pool, checkpoint_of, name):
    model, exit_layer = checkpoint_of(name)
    settings = {"max_num_batched_tokens": 48, "enable_prefix_caching": False}
    expected = pool.get(model, **settings).greedy(PROMPTS, max_tokens=24)
    engine = pool.layerskip(model, exit_layer, 4, **settings)
    with engine.counting() as counts:
        assert engine.greedy(PROMPTS, max_tokens=24) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_full > 0, "no step mixed prefill with verification"
    assert counts.num_verify_steps_reused > 0


@pytest.fixture(scope="module")
def tapes():
    """On a CPU tapes stand in for graphs; engines that were captured need them to the end."""
    import stand_in_graphs  # It patches vLLM's CPU attention.

    with stand_in_graphs.stand_in_graphs():
        yield stand_in_graphs


@pytest.mark.skipif(ON_GPU, reason="on a GPU every engine here has its graphs")
@pytest.mark.parametrize(
    "name", ["interleaved", pytest.param("early-window-only", marks=pytest.mark.slow)]
)
def test_graphs_refresh_every_kv_cache_group(pool, checkpoint_of, tapes, monkeypatch, name):
    """Draft and verify graphs with two groups, for a batch of two and for a padded one."""
    model, exit_layer = checkpoint_of(name)
    plain = pool.get(model, block_size=BLOCK_SIZE)
    batches = (PROMPTS[:2], PROMPTS[1:])
    expected = [plain.greedy(batch, max_tokens=70) for batch in batches]
    engine = pool.layerskip(model, exit_layer, 3, block_size=BLOCK_SIZE)
    tapes.capture(engine.runner, [1, 2, 4, 8, 16])
    replays: Counter[type] = Counter()
    run_fullgraph = CudaGraphManager.run_fullgraph

    def counted(self, desc):
        replays[type(self)] += 1
        return run_fullgraph(self, desc)

    monkeypatch.setattr(CudaGraphManager, "run_fullgraph", counted)
    for batch, tokens in zip(batches, expected, strict=True):
        with engine.counting() as counts:
            assert engine.greedy(batch, max_tokens=70) == tokens
        counts.assert_speculated()
        assert counts.num_verify_steps_reused > counts.num_verify_steps_full
    assert replays[DraftCudaGraphManager] > 0
    assert replays[ModelCudaGraphManager] > 0
