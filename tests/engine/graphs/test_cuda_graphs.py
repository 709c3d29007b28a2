# SPDX-License-Identifier: Apache-2.0
"""Catch a graph that bakes in what changes from step to step: capture, padding, dispatch and
replay of the draft graph and of the reuse graph.

On a CPU the graphs are tapes (``stand_in_graphs.py``); on a GPU the same tests run on CUDA graphs
and compiled stages: ``python -m pytest tests/engine/graphs/test_cuda_graphs.py``.
"""

import contextlib
import json
from collections import Counter

import pytest
import torch
from engines import ON_GPU, EnginePool
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.math_utils import round_up
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

SPEC = {"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 3}
# Draft graphs of 1, 2 and 4 rows, verify graphs of 1, 2 and 4 rows of 4 tokens: a batch of
# three rows is padded in both.
CAPTURE_SIZES = [1, 2, 4, 8, 16]


@pytest.fixture(scope="module")
def graphs():
    """Starts engines with captured graphs; one process keeps its engines to the end."""
    pool = EnginePool()
    settings = {"compilation_config": {"cudagraph_capture_sizes": CAPTURE_SIZES}}

    def start(checkpoint, engine_settings=None, start=None, **spec):
        known = len(pool)
        engine = pool.get(
            checkpoint,
            speculative_config={**SPEC, **spec},
            **(settings if ON_GPU else {}),
            **(engine_settings or {}),
        )
        if len(pool) > known:
            if not ON_GPU:
                (start or capture_alone)(engine)
            runner = engine.runner
            engine.num_replays = Counter()
            _count_replays(engine, "verify", runner.cudagraph_manager)
            _count_replays(engine, "draft", runner.speculator.draft_graphs)
        return engine

    if ON_GPU:
        tapes = contextlib.nullcontext()
    else:
        import stand_in_graphs  # It patches vLLM's CPU attention.

        tapes = stand_in_graphs.stand_in_graphs()
    with tapes:
        yield start
        pool.close()


def capture_alone(engine):
    import stand_in_graphs

    stand_in_graphs.capture(engine.runner, CAPTURE_SIZES)


def stand_in_start(engine):
    import stand_in_graphs

    (worker,) = engine.llm.collective_rpc(lambda worker: worker)
    stand_in_graphs.start_as_on_a_gpu(worker, CAPTURE_SIZES)


def _count_replays(engine, name, manager):
    run_fullgraph = manager.run_fullgraph

    def counted(desc):
        engine.num_replays[name] += 1
        return run_fullgraph(desc)

    manager.run_fullgraph = counted


@pytest.fixture(scope="module")
def engine(graphs, checkpoint):
    return graphs(checkpoint)


@pytest.fixture(scope="module")
def plain(pool, checkpoint):
    return pool.get(checkpoint)


def test_a_graph_per_batch_size_holds_all_passes(engine):
    drafts = engine.runner.speculator.draft_graphs.graphs
    assert {(desc.num_reqs, desc.num_speculative_tokens) for desc in drafts} == {
        (1, 3),
        (2, 3),
        (4, 3),
    }
    verify = engine.runner.cudagraph_manager.graphs
    assert {(desc.num_reqs, desc.uniform_token_count) for desc in verify} == {
        (1, 4),
        (2, 4),
        (4, 4),
    }


@pytest.mark.parametrize("num_prompts", [1, 3, 6])
def test_tokens_equal_plain_decoding(engine, plain, prompts, num_prompts):
    """Three prompts leave a padded row, six mix prefills into the decodes of four slots."""
    before = engine.num_replays.copy()
    with engine.counting() as counts:
        tokens = engine.greedy(prompts[:num_prompts], 24)
    after = engine.num_replays
    assert tokens == plain.greedy(prompts[:num_prompts], 24)
    counts.assert_speculated()
    assert after["verify"] > before["verify"]
    assert after["draft"] > before["draft"]
    assert counts.num_verify_steps_reused > counts.num_verify_steps_full


def test_a_prompt_that_ends_in_one_new_token_has_its_exit_states_computed_first(
    engine, plain, monkeypatch
):
    """vLLM dispatches a cached prompt's last token, padded to a decode, to the decode graph.

    The graph is padded to four rows; what runs before it is an eager step of three.
    """
    block_size = engine.vllm_config.cache_config.block_size
    prompt = [20 + token % 400 for token in range(block_size + 1)]
    other = [30 + token % 300 for token in range(40)]
    model, eager_steps = engine.runner.model, []
    run_early_stage = model.run_early_stage

    def counted(input_ids, positions, *args):
        eager_steps.append((len(input_ids), len(positions)))
        return run_early_stage(input_ids, positions, *args)

    tokens = {}
    for one in (engine, plain):
        one.greedy([prompt], 4)  # The prompt's full blocks are cached from here on.
        one.start("decodes", other, 20)
        one.start("decodes, too", other[:30], 20)
        for _ in range(3):
            one.step()
        replayed = engine.num_replays["verify"]
        full = engine.verify_stats().num_verify_steps_full
        one.start("cached", prompt, 10)
        with monkeypatch.context() as patch:
            patch.setattr(model, "run_early_stage", counted)
            one.step()
        if one is engine:
            assert eager_steps == [(12, 12)], "three rows of four tokens"
            # Otherwise this step would test nothing.
            assert engine.num_replays["verify"] == replayed + 1
            assert engine.verify_stats().num_verify_steps_full == full + 1
        tokens[one] = one.run_to_end()
    assert tokens[engine] == tokens[plain]


def test_tokens_change_when_the_states_a_graph_reads_are_spoiled(engine, plain, prompts):
    """Negative control: with a graph that ignores exit states no token would change."""
    states = engine.runner.model_state.draft_state.exit_states.states
    expected = plain.greedy(prompts[:2], 24)
    engine.start("0", prompts[0], 24)
    engine.start("1", prompts[1], 24)
    for _ in range(2):
        engine.step()
    states.normal_()
    tokens = engine.run_to_end()
    assert [tokens["0"], tokens["1"]] != expected
    assert engine.greedy(prompts[:2], 24) == expected, "spoiled states outlived their step"


def test_positions_end_with_the_model(engine, plain):
    prompt = [20 + token % 400 for token in range(240)]
    before = engine.num_replays["draft"]
    with engine.counting() as counts:
        tokens = engine.greedy([prompt], 60)
    assert tokens == plain.greedy([prompt], 60)
    counts.assert_speculated()
    assert engine.num_replays["draft"] > before


def test_a_schedule_has_a_graph_per_number_of_drafts_and_none_for_no_drafts(
    graphs, plain, checkpoint, prompts
):
    schedule = [[1, 1, 3], [2, 2, 2], [3, 4, 0]]
    engine = graphs(checkpoint, num_speculative_tokens_per_batch_size=schedule)
    verify = engine.runner.cudagraph_manager.graphs
    # For each number of drafts, the sizes that the schedule gives it, and one request.
    assert {(desc.num_reqs, desc.uniform_token_count) for desc in verify} == {
        *((1, 4), (1, 3), (1, 1)),
        *((2, 3), (4, 1)),
    }
    drafts = engine.runner.speculator.draft_graphs.graphs
    assert {(desc.num_reqs, desc.num_speculative_tokens) for desc in drafts} == {(1, 3), (2, 2)}

    expected = plain.greedy(prompts[:3], 16)
    # Three requests without drafts are as many tokens as one request with two.
    for number in (1, 2, 3):
        engine.num_replays.clear()
        with engine.counting() as counts:
            assert engine.greedy(prompts[:number], 16) == expected[:number]
        assert engine.num_replays["verify"] > 0
        if number <= 2:
            counts.assert_speculated()
            assert engine.num_replays["draft"] > 0


@pytest.mark.parametrize("draft_vocab", [False, True], ids=["all", "draft-vocab"])
def test_seeded_samples_are_those_of_an_engine_without_graphs(
    graphs, pool, checkpoint, prompts, tmp_path, draft_vocab
):
    from vllm import SamplingParams

    spec = {"draft_sample_method": "probabilistic"}
    if draft_vocab:
        (tmp_path / "ids").write_text(json.dumps(list(range(0, 1024, 2))))
        spec["draft_vocab"] = str(tmp_path / "ids")
    params = [
        SamplingParams(temperature=0.8, seed=seed, max_tokens=12, ignore_eos=True)
        for seed in range(3)
    ]
    eager = pool.get(checkpoint, speculative_config={**SPEC, **spec})
    engine = graphs(checkpoint, **spec)
    with engine.counting() as counts:
        tokens = engine.generate(prompts[:3], params)
    assert tokens == eager.generate(prompts[:3], params)
    counts.assert_speculated()
    assert engine.num_replays["verify"] > 0
    assert engine.num_replays["draft"] > 0


def test_a_full_batch_drafts_from_a_graph_of_its_own(graphs, plain, checkpoint, prompts):
    """vLLM's sizes cover a full batch's verification, but only two of three requests' drafts."""
    engine = graphs(checkpoint, engine_settings={"max_num_seqs": 3})
    drafts = engine.runner.speculator.draft_graphs.graphs
    assert {desc.num_reqs for desc in drafts} == {1, 2, 3}
    engine.num_replays.clear()
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], 16) == plain.greedy(prompts[:3], 16)
    counts.assert_speculated()
    assert engine.num_replays["draft"] >= engine.num_replays["verify"] > 0


@pytest.mark.skipif(ON_GPU, reason="on a GPU every engine starts so")
def test_an_engine_that_starts_as_on_a_gpu(plain, graphs, checkpoint, prompts):
    """Graphs that outlive the throw-away KV cache, or read it, would give wrong tokens. vLLM's
    warm-up steps serve no request, so they are not counted."""
    engine = graphs(
        checkpoint, start=stand_in_start, engine_settings={"max_num_batched_tokens": 128}
    )
    assert engine.verify_stats()[:2] == (0, 0)
    expected = plain.greedy(prompts[:3], 24)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], 24) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > counts.num_verify_steps_full
    assert engine.num_replays["verify"] > 0
    assert engine.num_replays["draft"] > 0


def test_without_reuse_graphs_hold_the_ordinary_forward(graphs, plain, checkpoint, prompts):
    engine = graphs(checkpoint, reuse_exit_states=False)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3], 16) == plain.greedy(prompts[:3], 16)
    counts.assert_speculated()
    assert counts.num_verify_steps_reused == 0
    assert engine.num_replays["verify"] > 0
    assert engine.num_replays["draft"] > 0


@pytest.mark.skipif(ON_GPU, reason="plays a piecewise step on an engine without graphs")
def test_piecewise_graphs_find_the_late_stages_inputs_where_they_were(
    pool, plain, checkpoint, prompts, monkeypatch
):
    """A piecewise graph replays on the addresses of its capture, padded to a captured size."""
    engine = pool.get(checkpoint, speculative_config=SPEC)
    model = engine.runner.model
    hidden_size = engine.vllm_config.model_config.get_hidden_size()
    monkeypatch.setattr(model, "_late_stage_inputs", torch.full((2, 256, hidden_size), 77.0))
    early_stage, late_stage = model._stages
    addresses = set()

    def run_late_stage(positions, hidden_states, residual):
        addresses.add((hidden_states.data_ptr(), residual.data_ptr()))
        return late_stage(positions, hidden_states, residual)

    def dispatch(num_reqs, num_tokens, *args, **kwargs):
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.PIECEWISE, num_tokens=round_up(num_tokens, 16), num_reqs=None
        )

    monkeypatch.setattr(model, "_stages", (early_stage, run_late_stage))
    monkeypatch.setattr(engine.runner.cudagraph_manager, "dispatch", dispatch)
    with engine.counting() as counts:
        assert engine.greedy(prompts, 16) == plain.greedy(prompts, 16)
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    assert addresses == {tuple(part.data_ptr() for part in model._late_stage_inputs)}
