# SPDX-License-Identifier: Apache-2.0
"""Draft twins in CUDA graphs and as compiled units.

Catches a graph that keeps a twin's old weights, and a twin that is left out of the draft graph or
uncompiled. On a CPU the graphs are tapes (``stand_in_graphs.py``).
"""

from __future__ import annotations

import pytest
import torch
from checkpoints import random_llama
from engines import ON_GPU
from test_cuda_graphs import graphs, stand_in_start  # noqa: F401
from twins import linears_of, outputs, rounding_error, speculating, twin_engine, twin_of
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

ALL = "all"
TWIN = {"exit_layer": ALL, "draft_quantization": "int4", "num_speculative_tokens": 3}
PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]


@pytest.fixture(scope="module", autouse=True)
def unpacked():
    """Weights stay where they are loaded, as on a GPU: vLLM's CPU build packs and drops them."""
    with pytest.MonkeyPatch.context() as patch:

        def keep(self, layer):
            layer.cpu_linear = torch.nn.functional.linear

        if not ON_GPU:
            for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
                patch.setattr(method, "process_weights_after_loading", keep)
        yield


@pytest.fixture(scope="module")
def engine(graphs, checkpoint):  # noqa: F811
    return graphs(checkpoint, **TWIN)


@pytest.mark.parametrize("num_prompts", [1, 3, 6])
def test_tokens_equal_plain_decoding(pool, checkpoint, engine, prompts, num_prompts):
    """Three prompts leave a padded row, six mix prefills into the decodes of four slots."""
    expected = pool.get(checkpoint).greedy(prompts[:num_prompts], 24)
    engine.num_replays.clear()
    with speculating(engine) as counts:
        assert engine.greedy(prompts[:num_prompts], 24) == expected
    assert engine.num_replays["draft"] > 0
    assert engine.num_replays["verify"] > 0
    assert counts.num_accepted_tokens > 0.5 * counts.num_draft_tokens


def pointers(engine):
    return [
        parameter.data_ptr()
        for linear in linears_of(engine)
        for parameter in linear.module._parameters.values()
        if parameter is not None
    ]


def test_new_weights_are_made_where_graphs_read_them(pool, graphs, tmp_path):  # noqa: F811
    """First loaded, then written in place; a fresh engine without graphs drafts the same."""
    first, second = (random_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    engine = graphs(first, **TWIN)
    assert engine.greedy(PROMPTS, 24) == pool.get(first).greedy(PROMPTS, 24)
    before, weights = pointers(engine), outputs(twin_of(engine).linears[0])
    fresh = twin_engine(pool, second, ALL, 3)
    plain = pool.get(second)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
    for change in (lambda one: None, write_in_place):
        for one in (engine, fresh, plain):
            change(one)
            one.reset_prefix_cache()
        engine.num_replays.clear()
        with speculating(engine) as counts:
            tokens = engine.greedy(PROMPTS, 24)
        with speculating(fresh) as expected_counts:
            assert tokens == fresh.greedy(PROMPTS, 24) == plain.greedy(PROMPTS, 24)
        assert counts.drafts == expected_counts.drafts
        assert engine.num_replays["draft"] > 0
        assert pointers(engine) == before
        assert not torch.equal(outputs(twin_of(engine).linears[0]), weights)
        weights = outputs(twin_of(engine).linears[0])
        for linear in linears_of(engine):
            assert rounding_error(linear, "int4") < 1e-6


def write_in_place(engine):
    """As a transfer does that bypasses ``load_weights``."""

    def write(model):
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.shape[1]))

    engine.llm.apply_model(write)


@pytest.mark.skipif(ON_GPU, reason="on a GPU every engine starts so")
def test_an_engine_that_starts_as_on_a_gpu(pool, graphs, checkpoint, prompts):  # noqa: F811
    engine = graphs(
        checkpoint,
        start=stand_in_start,
        engine_settings={"max_num_batched_tokens": 128},
        **TWIN,
    )
    expected = pool.get(checkpoint).greedy(prompts[:3], 24)
    with speculating(engine):
        assert engine.greedy(prompts[:3], 24) == expected
    assert engine.num_replays["draft"] > 0
    assert engine.num_replays["verify"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_twin_is_a_unit_of_its_own(pool, checkpoint, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=30)
    # The same exit layer with other weights, and all layers: no unit takes another one's place.
    for exit_layer, spec in (
        (3, {"draft_quantization": "int4"}),
        (3, {"draft_quantization": "int8"}),
        (ALL, {"draft_quantization": "int4"}),
    ):
        engine = pool.layerskip(checkpoint, exit_layer, 4, spec=spec, enforce_eager=False)
        with speculating(engine):
            assert engine.greedy(prompts[:4], max_tokens=30) == expected
        model = engine.runner.model
        (stage,) = model._stages
        assert stage._compile_tag == "layerskip_twin"
        for unit in (stage, model.model):
            assert not unit.do_not_compile
            assert unit.compiled
