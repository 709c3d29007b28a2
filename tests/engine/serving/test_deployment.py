# SPDX-License-Identifier: Apache-2.0
"""Process layouts beyond one engine: Ray's workers, data parallel engines, and a worker's death.

Catches a plugin or a variable that does not reach a process, an engine that speculates for
another, and a worker that dies in the middle of a draft and leaves wrong tokens or a hang.
"""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from engines import ENGINE_DEFAULTS
from processes import HERE, python_path, run_script

MAX_TOKENS = 24
SPEC = {"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 5}
TWO_PLACES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def run(script: str, engine: dict, environment: dict[str, str], **request) -> dict:
    """Run a script of this folder on a request and return the result that it printed."""
    return run_with([sys.executable], script, engine, environment, **request)[0]


def run_with(
    launcher: list[str], script: str, engine: dict, environment: dict[str, str], **request
) -> list[dict]:
    """The results of all processes that the launcher starts."""
    request = {"engine": {**ENGINE_DEFAULTS, "speculative_config": SPEC, **engine}, **request}
    results, _ = run_script(
        script,
        json.dumps(request),
        environment=environment,
        launcher=launcher,
    )
    return results


def assert_two_ranks_speculated(result: dict) -> None:
    assert len(result["stats"]) == 2
    assert result["stats"][0] == result["stats"][1], "ranks disagree"
    assert result["stats"][0]["num_verify_steps_reused"] > 0
    assert_speculated(result)


def assert_speculated(result: dict) -> None:
    drafted = result["metrics"]["vllm:spec_decode_num_draft_tokens"]
    assert 0 < result["metrics"]["vllm:spec_decode_num_accepted_tokens"] <= drafted


@pytest.mark.parametrize(
    ("engine", "environment", "rank"),
    [
        ({}, {}, 0),
        pytest.param(
            {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
            TWO_PLACES,
            1,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["engine-process", "one-of-two-ranks"],
)
def test_a_worker_killed_mid_draft_ends_requests_with_an_error(
    pool, checkpoint, prompts, engine, environment, rank
):
    expected = pool.get(checkpoint).greedy(prompts[:3], max_tokens=100)
    engine = {
        "model": str(checkpoint),
        "worker_extension_cls": "dying_worker.DyingWorkerExtension",
        **engine,
    }
    started = time.monotonic()
    result = run(
        "generate_async.py",
        engine,
        environment,
        prompts=prompts[:3],
        max_tokens=100,
        die_in_draft_on_rank=rank,
    )
    assert time.monotonic() - started < 400
    for wanted, seen in zip(expected, result["seen"], strict=True):
        assert seen["error"] == "EngineDeadError"
        assert 0 < len(seen["tokens"]) < len(wanted)
        assert seen["tokens"] == wanted[: len(seen["tokens"])]


def test_a_dummy_batch_between_two_steps_changes_nothing(pool, checkpoint, prompts):
    """What a data parallel rank runs while it has no request, at the worst moment: between a
    draft and its verification."""
    expected = pool.get(checkpoint).greedy(prompts[:2], max_tokens=40)
    engine = pool.layerskip(checkpoint, 3, 4)
    # Asked for before the steps: a call of a test's own function may have changed weights.
    runner = engine.runner
    exit_states = runner.speculator.draft_state.exit_states
    with engine.counting() as counts:
        engine.start("0", prompts[0], 40)
        engine.start("1", prompts[1], 40)
        for _ in range(6):
            engine.step()
            before = [cache.clone() for cache in runner.kv_caches]
            states = exit_states.states.clone()
            num_valid = exit_states.num_valid_np.copy()
            assert num_valid.max() == 4, "nothing was drafted"
            engine.llm.collective_rpc("execute_dummy_batch")
            for cache, cache_before in zip(runner.kv_caches, before, strict=True):
                assert torch.equal(cache, cache_before)
            assert torch.equal(exit_states.states, states)
            assert (exit_states.num_valid_np == num_valid).all()
        tokens = engine.run_to_end()
    assert [tokens[str(i)] for i in range(2)] == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0


@pytest.mark.slow
def test_two_data_parallel_engines(pool, checkpoint, prompts):
    """Each has its own requests; one that has none takes part in no draft."""
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=MAX_TOKENS)
    engine = {"model": str(checkpoint), "data_parallel_size": 2}
    for chosen in ([0, 1, 2, 3], [2]):
        result = run(
            "generate_async.py",
            engine,
            TWO_PLACES,
            prompts=[prompts[i] for i in chosen],
            max_tokens=MAX_TOKENS,
        )
        assert [seen["error"] for seen in result["seen"]] == [None] * len(chosen)
        assert [seen["tokens"] for seen in result["seen"]] == [expected[i] for i in chosen]
        accepted = result["accepted_by_engine"]
        assert set(accepted) == {"0", "1"}
        assert sum(count > 0 for count in accepted.values()) == min(len(chosen), 2)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["RayExecutorV2", "RayDistributedExecutor"])
def test_two_ranks_under_rays_executor(pool, checkpoint, prompts, executor):
    """vLLM's CPU platform refuses Ray; ``ray_on_cpu`` is that platform with a place for Ray."""
    pytest.importorskip("ray")
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=MAX_TOKENS)
    result = run(
        "generate_in_process.py",
        {
            "model": str(checkpoint),
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "ray",
        },
        {
            **python_path(HERE, HERE / "ray_on_cpu"),
            # The engine in the driver's process, beside the cluster that it starts.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": str(int(executor == "RayExecutorV2")),
        },
        prompts=prompts[:4],
        max_tokens=MAX_TOKENS,
        ray={"num_gpus": 2, "num_cpus": 2, "include_dashboard": False},
    )
    assert result["executor"] == executor
    assert result["tokens"] == expected
    assert_two_ranks_speculated(result)


@pytest.mark.slow
def test_two_ranks_that_torchrun_starts(pool, checkpoint, prompts):
    """``external_launcher``: each process schedules for itself, so both must accept the same."""
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=MAX_TOKENS)
    results = run_with(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "generate_in_process.py",
        {
            "model": str(checkpoint),
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "external_launcher",
        },
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        prompts=prompts[:4],
        max_tokens=MAX_TOKENS,
    )
    assert len(results) == 2
    for result in results:
        assert result["tokens"] == expected
        assert_speculated(result)
        assert result["stats"][0]["num_verify_steps_reused"] > 0
