# SPDX-License-Identifier: Apache-2.0
"""vLLM's normal settings: bfloat16, its own choice of attention, torch.compile, FULL and
PIECEWISE CUDA graphs, async scheduling. Tokens of bfloat16 depend on batch shapes, so these tests
check acceptance; ``tests/engine/graphs/test_cuda_graphs.py`` checks equal tokens, in float32."""

import pytest
import torch
from engines import ON_GPU
from vllm.config.compilation import CUDAGraphMode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="no CUDA GPU"),
    pytest.mark.timeout(900),  # Starts compile and capture.
]

DEFAULTS = {"dtype": "bfloat16", "attention_backend": None, "max_num_batched_tokens": 2048}


@pytest.mark.parametrize("num_speculative_tokens", [1, 5])
def test_drafts_are_accepted_as_on_a_cpu(pool, checkpoint, prompts, num_speculative_tokens):
    engine = pool.layerskip(checkpoint, 3, num_speculative_tokens, **DEFAULTS)
    with engine.counting() as counts:
        engine.greedy(prompts, 80)
    counts.assert_speculated()
    # The card's acceptance length at K = 5 is 2.51 over many prompts.
    low, high = (1.3, 2.0) if num_speculative_tokens == 1 else (1.8, 3.6)
    assert low < counts.acceptance_length <= high
    assert counts.num_verify_steps_reused > counts.num_verify_steps_full


def test_all_graphs_of_the_default_mode_are_in_use(pool, checkpoint, prompts):
    engine = pool.layerskip(checkpoint, 3, 5, **DEFAULTS)
    mode = engine.vllm_config.compilation_config.cudagraph_mode
    assert mode == CUDAGraphMode.FULL_AND_PIECEWISE
    speculator = engine.runner.speculator
    assert speculator.supports_decode_metadata_update
    assert {desc.num_reqs for desc in speculator.draft_graphs.graphs} == {1, 2, 4}
    uniform = {desc.uniform_token_count for desc in engine.runner.cudagraph_manager.graphs}
    assert 6 in uniform


def test_extra_memory_is_the_exit_states_and_the_graphs(pool, checkpoint):
    """No second set of weights, no second KV cache."""
    engine = pool.layerskip(checkpoint, 3, 5, **DEFAULTS)
    parameters = {p.data_ptr(): p.nbytes for p in engine.runner.model.parameters()}
    plain = pool.get(checkpoint, **DEFAULTS)
    expected = {p.data_ptr(): p.nbytes for p in plain.runner.model.parameters()}
    assert sum(parameters.values()) == sum(expected.values())
    layers = engine.vllm_config.compilation_config.static_forward_context
    expected_layers = plain.vllm_config.compilation_config.static_forward_context
    assert layers.keys() == expected_layers.keys()


def test_two_exit_layers_share_a_compile_cache(pool, checkpoint, prompts):
    tokens = {}
    for exit_layer in (2, 6):
        engine = pool.layerskip(checkpoint, exit_layer, 3, dtype="float32")
        with engine.counting() as counts:
            tokens[exit_layer] = engine.greedy(prompts)
        counts.assert_speculated()
    assert tokens[2] == tokens[6] == pool.get(checkpoint, dtype="float32").greedy(prompts)


def test_a_step_without_drafts_costs_no_draft_kernels(pool, checkpoint, prompts):
    schedule = [[1, 1, 3], [2, 4, 0]]
    spec = {"num_speculative_tokens_per_batch_size": schedule}
    engine = pool.layerskip(checkpoint, 3, 3, spec=spec, **DEFAULTS)
    engine.greedy(prompts[:4], 8)  # Warm.
    engine.start("0", prompts[0], 40)
    engine.start("1", prompts[3], 40)
    for _ in range(3):
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            engine.step()
    engine.run_to_end()
    kernels = {event.key for event in profile.key_averages()}
    assert not {name for name in kernels if "_advance_kernel" in name or "_store_kernel" in name}
