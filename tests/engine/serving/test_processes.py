# SPDX-License-Identifier: Apache-2.0
"""Engines outside of the test process: vLLM's own process layout, and two ranks.

Catches a config that does not survive the way to another process, a plugin that is not
loaded there, and ranks that draft different tokens (docs/tests.md, T17).
"""

from __future__ import annotations

import json

import pytest
from engines import ENGINE_DEFAULTS
from features import FEATURES, SAMPLED, sampling_params
from processes import run_script

MAX_TOKENS = 24


def generate(checkpoint, prompts, environment, features=(), **engine):
    request = {
        "engine": {
            **ENGINE_DEFAULTS,
            "model": str(checkpoint),
            **engine,
        },
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
        "features": list(features),
    }
    (result,), _ = run_script(
        "generate_in_process.py", json.dumps(request), environment=environment
    )
    return result


TWO_RANKS = (
    {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
)


@pytest.mark.parametrize(
    ("environment", "engine", "spec"),
    [
        ({}, {}, {}),
        # The default run has two ranks with a draft vocabulary.
        pytest.param(*TWO_RANKS, {}, marks=pytest.mark.slow),
        pytest.param(*TWO_RANKS, {"use_local_argmax_reduction": True}, marks=pytest.mark.slow),
        (*TWO_RANKS, {"draft_vocab": "FILE"}),
        pytest.param(
            *TWO_RANKS,
            {"draft_vocab": "FILE", "draft_sample_method": "probabilistic"},
            marks=pytest.mark.slow,  # The default run has unit/worker/test_draft_head.py.
        ),
    ],
    ids=[
        "engine-process",
        "two-ranks",
        "two-ranks-local-argmax",
        "two-ranks-draft-vocab",
        "two-ranks-draft-vocab-probabilistic",
    ],
)
def test_tokens_equal_plain_decoding(
    pool, checkpoint, prompts, tmp_path, environment, engine, spec
):
    if "draft_vocab" in spec:
        # Odd ids, on both ranks' shards of the LM head: some drafts fail for lack of a token.
        (tmp_path / "ids").write_text(json.dumps(list(range(1, 1024, 2))))
        spec = {**spec, "draft_vocab": str(tmp_path / "ids")}
    engine = {"speculative_config": {"method": "layerskip", "exit_layer": 3, **spec}, **engine}
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=MAX_TOKENS)
    result = generate(checkpoint, prompts[:4], environment, **engine)
    assert result["tokens"] == expected
    assert len(result["stats"]) == engine.get("tensor_parallel_size", 1)
    assert all(stats == result["stats"][0] for stats in result["stats"]), "ranks disagree"
    assert result["stats"][0]["num_verify_steps_reused"] > 0
    metrics = result["metrics"]
    drafted = metrics["vllm:spec_decode_num_draft_tokens"]
    assert 0 < metrics["vllm:spec_decode_num_accepted_tokens"] <= drafted


@pytest.mark.parametrize(
    "async_scheduling", [pytest.param(False, marks=pytest.mark.slow), True], ids=["sync", "async"]
)
def test_every_feature_in_vllms_own_processes(pool, checkpoint, prompts, async_scheduling):
    """Scheduler, worker and client each in a process: with async scheduling steps do overlap."""
    names = [name for name in FEATURES if name not in SAMPLED]
    batch = [prompts[index % len(prompts)] for index in range(len(names))]
    settings = {
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}
    }
    params = [sampling_params(name) for name in names]
    expected = pool.get(checkpoint, **settings).generate(batch, params)
    result = generate(
        checkpoint,
        batch,
        {},
        features=names,
        speculative_config={"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 4},
        async_scheduling=async_scheduling,
        **settings,
    )
    assert result["async_scheduling"] is async_scheduling
    assert dict(zip(names, result["tokens"], strict=True)) == dict(
        zip(names, expected, strict=True)
    )
    assert result["stats"][0]["num_verify_steps_reused"] > 0
    drafted = result["metrics"]["vllm:spec_decode_num_draft_tokens"]
    assert 0 < result["metrics"]["vllm:spec_decode_num_accepted_tokens"] <= drafted
