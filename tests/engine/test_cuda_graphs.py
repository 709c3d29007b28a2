# SPDX-License-Identifier: Apache-2.0
"""Catch a graph that bakes in what changes from step to step: capture, padding, dispatch and
replay of the draft graph and of the reuse graph, on tapes (``stand_in_graphs.py``)."""

import pytest
from engines import EnginePool
from stand_in_graphs import capture, num_replays, stand_in_graphs

SPEC = {"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 3}
# Draft graphs of 1, 2 and 4 rows, verify graphs of 1, 2 and 4 rows of 4 tokens: a batch of
# three rows is padded in both.
CAPTURE_SIZES = [1, 2, 4, 8, 16]


@pytest.fixture(scope="module")
def graphs():
    """Starts engines with captured graphs; one process keeps its engines to the end."""
    pool = EnginePool()
    captured = set()

    def start(checkpoint, **spec):
        engine = pool.get(checkpoint, speculative_config={**SPEC, **spec})
        if engine not in captured:
            captured.add(engine)
            capture(engine.runner, CAPTURE_SIZES)
        return engine

    with stand_in_graphs():
        yield start
        pool.close()


@pytest.fixture(scope="module")
def engine(graphs, checkpoint):
    return graphs(checkpoint)


@pytest.fixture(scope="module")
def plain(pool, checkpoint):
    return pool.get(checkpoint)


def replays(engine):
    runner = engine.runner
    return num_replays(runner.cudagraph_manager), num_replays(runner.speculator.draft_graphs)


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


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 4, 6])
def test_tokens_equal_plain_decoding(engine, plain, prompts, num_prompts):
    """Three prompts leave a padded row, six mix prefills into the decodes of four slots."""
    before = replays(engine)
    with engine.counting() as counts:
        tokens = engine.greedy(prompts[:num_prompts])
    after = replays(engine)
    assert tokens == plain.greedy(prompts[:num_prompts])
    counts.assert_speculated()
    assert after[0] > before[0], "no verify step replayed a graph"
    assert after[1] > before[1], "no batch drafted in a graph"
    assert counts.num_verify_steps_reused > counts.num_verify_steps_full


def test_a_prompt_that_ends_in_one_new_token_has_its_exit_states_computed_first(engine, plain):
    """vLLM dispatches a cached prompt's last token, padded to a decode, to the decode graph."""
    block_size = engine.vllm_config.cache_config.block_size
    prompt = [20 + token % 400 for token in range(block_size + 1)]
    other = [30 + token % 300 for token in range(40)]
    tokens, full = {}, 0
    for one in (engine, plain):
        one.greedy([prompt], 4)  # The prompt's full blocks are cached from here on.
        one.start("decodes", other, 30)
        for _ in range(3):
            one.step()
        before = replays(engine)[0], engine.verify_stats()["num_verify_steps_full"]
        one.start("cached", prompt, 20)
        one.step()
        if one is engine:
            replayed = replays(engine)[0] - before[0]
            full = engine.verify_stats()["num_verify_steps_full"] - before[1]
        tokens[one] = one.run_to_end()
    assert tokens[engine] == tokens[plain]
    assert replayed == 1, "the step did not replay a graph, so nothing was at stake"
    assert full == 1


def test_tokens_change_when_the_states_a_graph_reads_are_spoiled(engine, plain, prompts):
    """Without this a graph that ignores exit states would pass for one that reuses them."""
    states = engine.runner.model_state.exit_states.states
    expected = plain.greedy(prompts[:2])
    engine.start("0", prompts[0], 40)
    engine.start("1", prompts[1], 40)
    for _ in range(2):
        engine.step()
    states.normal_()
    tokens = engine.run_to_end()
    assert [tokens["0"], tokens["1"]] != expected
    assert engine.greedy(prompts[:2]) == expected, "spoiled states outlived their step"


def test_positions_end_with_the_model(engine, plain):
    prompt = [20 + token % 400 for token in range(240)]
    before = replays(engine)
    with engine.counting() as counts:
        tokens = engine.greedy([prompt], 60)
    assert tokens == plain.greedy([prompt], 60)
    counts.assert_speculated()
    assert replays(engine)[1] > before[1]


def test_a_schedule_has_a_graph_per_number_of_drafts_and_none_for_no_drafts(
    graphs, plain, checkpoint, prompts
):
    schedule = [[1, 1, 3], [2, 2, 2], [3, 4, 0]]
    engine = graphs(checkpoint, num_speculative_tokens_per_batch_size=schedule)
    drafts = engine.runner.speculator.draft_graphs.graphs
    assert {(desc.num_reqs, desc.num_speculative_tokens) for desc in drafts} == {(1, 3), (2, 2)}

    expected = plain.greedy(prompts[:4])
    for number in (1, 2, 4):
        before = replays(engine)
        with engine.counting() as counts:
            assert engine.greedy(prompts[:number]) == expected[:number]
        verify, draft = (new - old for new, old in zip(replays(engine), before, strict=True))
        assert verify > 0
        if number <= 2:
            counts.assert_speculated()
            assert draft > 0


def test_seeded_samples_are_those_of_an_engine_without_graphs(graphs, pool, checkpoint, prompts):
    from vllm import SamplingParams

    spec = {"draft_sample_method": "probabilistic"}
    params = [
        SamplingParams(temperature=0.8, seed=seed, max_tokens=24, ignore_eos=True)
        for seed in range(3)
    ]
    eager = pool.get(checkpoint, speculative_config={**SPEC, **spec})
    engine = graphs(checkpoint, **spec)
    with engine.counting() as counts:
        tokens = engine.generate(prompts[:3], params)
    assert tokens == eager.generate(prompts[:3], params)
    counts.assert_speculated()
    assert all(count > 0 for count in replays(engine))


def test_without_reuse_graphs_hold_the_ordinary_forward(graphs, plain, checkpoint, prompts):
    engine = graphs(checkpoint, reuse_exit_states=False)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:3]) == plain.greedy(prompts[:3])
    counts.assert_speculated()
    assert counts.num_verify_steps_reused == 0
    assert all(count > 0 for count in replays(engine))
