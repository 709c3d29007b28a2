# SPDX-License-Identifier: Apache-2.0
"""What an engine counts reaches the person who runs it: ``/metrics`` of a real server with its
usual processes, ``LLM.get_metrics()``, and vLLM's numbers per request.

Catches counters that are lost between processes, counted once per rank or API server, or
missing under an option (docs/tests.md, T25).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counting_worker import EXTENSION
from processes import HERE
from prometheus_client.parser import text_string_to_metric_families
from servers import MODEL_NAME, Server
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from vllm_layerskip import __version__
from vllm_layerskip.metrics.prometheus import PREFIX

K = 5
SCHEDULE = [(1, 1, 5), (2, 2, 2), (3, 4, 0)]


def values_of(llm: Any) -> dict[str, Any]:
    return {
        metric.name: metric.values if hasattr(metric, "values") else metric.value
        for metric in llm.get_metrics()
        if hasattr(metric, "values") or hasattr(metric, "value")
    }


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_get_metrics_gives_what_was_counted(
    pool, checkpoint, prompts, async_scheduling, tmp_path_factory
):
    engine = pool.layerskip(
        checkpoint,
        3,
        K,
        spec={"num_speculative_tokens_per_batch_size": SCHEDULE},
        async_scheduling=async_scheduling,
        # The process's series are the newest engine's, so this test starts its own.
        served_model_name=tmp_path_factory.mktemp("metrics").name,
    )
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        for length in (60, 45, 30, 15)
    ]
    with engine.counting() as counts:
        engine.generate(prompts[:4], params)
        # A prefill beside a verification: the step runs the early stage for every token.
        engine.start("first", prompts[4], max_tokens=40)
        for _ in range(5):
            engine.step()
        engine.start("second", prompts[5], max_tokens=10)
        engine.run_to_end()
    counts.assert_speculated()
    assert {drafted for drafted, _ in counts.drafts} >= {2, 5}
    values = values_of(engine.llm)
    assert values["vllm:spec_decode_num_drafts"] == counts.num_drafts
    assert values["vllm:spec_decode_num_draft_tokens"] == counts.num_draft_tokens
    assert values["vllm:spec_decode_num_accepted_tokens"] == counts.num_accepted_tokens
    accepted = values["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert accepted == counts.accepted_per_position
    drafted = values[f"{PREFIX}num_draft_tokens_per_pos"]
    assert drafted == [
        sum(drafted > position for drafted, _ in counts.drafts) for position in range(K)
    ]
    assert values[f"{PREFIX}num_verify_steps_reused"] == counts.num_verify_steps_reused > 0
    assert values[f"{PREFIX}num_verify_steps_full"] == counts.num_verify_steps_full > 0
    assert values[f"{PREFIX}config_info"] == 1


def test_an_engine_without_statistics_counts_in_its_workers_alone(pool, checkpoint, prompts):
    engine = pool.layerskip(checkpoint, 3, K, disable_log_stats=True)
    expected = pool.get(checkpoint).greedy(prompts[:2], max_tokens=20)
    before = engine.verify_stats()
    assert engine.greedy(prompts[:2], max_tokens=20) == expected
    assert engine.verify_stats().num_verify_steps_reused > before.num_verify_steps_reused
    assert engine.llm.llm_engine.logger_manager is None


@contextlib.contextmanager
def drafts_by_request(engine: Any) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """(drafted, accepted) of each verification, as the scheduler counts them."""
    scheduler, drafts = engine.scheduler, {}
    observe = scheduler.make_spec_decoding_stats

    def make_spec_decoding_stats(stats: Any, **kwargs: Any) -> Any:
        counts = kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"]
        drafts.setdefault(kwargs["request_id"], []).append(counts)
        return observe(stats, **kwargs)

    scheduler.make_spec_decoding_stats = make_spec_decoding_stats
    try:
        yield drafts
    finally:
        del scheduler.make_spec_decoding_stats


@pytest.mark.parametrize("level", ["summary", "detailed"])
def test_numbers_of_a_request(pool, checkpoint, prompts, level):
    engine = pool.layerskip(checkpoint, 3, K, per_request_spec_decode_metrics=level)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts[:3]]
    with drafts_by_request(engine) as drafts:
        outputs = engine.llm.generate(inputs, params, use_tqdm=False)
    assert len(drafts) == len(outputs) == 3
    for output in outputs:
        # The engine adds to a request's name what makes it unique.
        (steps,) = [
            steps for name, steps in drafts.items() if name.split("-")[0] == output.request_id
        ]
        told = output.outputs[0].spec_decode_metrics
        told = told if isinstance(told, dict) else told.to_dict()
        accepted = [accepted for _, accepted in steps]
        assert told["num_spec_tokens"] == K
        assert told["num_spec_steps"] == len(steps)
        assert told["num_draft_tokens"] == sum(drafted for drafted, _ in steps)
        assert told["num_accepted_draft_tokens"] == sum(accepted) > 0
        assert told["acceptance_histogram"] == [accepted.count(j) for j in range(K + 1)]
        assert told["mean_acceptance_length"] == pytest.approx(1 + sum(accepted) / len(steps))
        assert told.get("per_step_accepted") == (accepted if level == "detailed" else None)


def scrape(server: Server) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples of ``/metrics`` by name and labels."""
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


SERVERS = {
    "two-api-servers": ["--api-server-count", "2"],
    "two-ranks": ["--tensor-parallel-size", "2"],
}


@pytest.fixture(
    scope="module",
    params=[
        "two-api-servers",
        pytest.param("two-ranks", marks=pytest.mark.slow),
    ],
)
def server(checkpoint: Path, tmp_path_factory, request) -> Iterator[Server]:
    flags = ["--speculative-model", "[self]", "--exit-layer", "3"]
    flags += ["--num-speculative-tokens", str(K), "--per-request-spec-decode-metrics", "detailed"]
    flags += ["--worker-extension-cls", EXTENSION]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # For /collective_rpc.
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        if request.param == "two-ranks":
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        server = Server(
            checkpoint,
            [*flags, *SERVERS[request.param]],
            tmp_path_factory.mktemp("serve-metrics") / "log",
        )
    yield server
    server.close()


def test_a_servers_metrics_are_the_workers_counts(server, prompts):
    steps: list[tuple[int, int]] = []
    for prompt in prompts[:4]:
        answer = json.loads(
            server.post(
                "/v1/completions",
                {
                    "model": MODEL_NAME,
                    "prompt": prompt,
                    "max_tokens": 30,
                    "temperature": 0,
                    "ignore_eos": True,
                },
            )
        )
        told = answer["metrics"]["speculative_decoding"]
        steps += zip(told["per_step_drafted"], told["per_step_accepted"], strict=True)
    workers = json.loads(server.post("/collective_rpc", {"method": "step_counts"}))["results"]
    assert all(stats == workers[0] for stats in workers)
    assert workers[0]["num_verify_steps_reused"] > 0

    samples: dict[str, Any] = {}
    deadline = time.monotonic() + 30  # A front end's files may lag behind its answers.
    while time.monotonic() < deadline:
        samples = scrape(server)
        if sum(samples["vllm:spec_decode_num_drafts_total"].values()) == len(steps):
            break
        time.sleep(0.2)
    labels = (("engine", "0"), ("model_name", MODEL_NAME))

    def positions(name: str) -> list[float]:
        return [samples[name][(*labels, ("position", str(k)))] for k in range(K)]

    assert samples["vllm:spec_decode_num_drafts_total"] == {labels: len(steps)}
    assert samples["vllm:spec_decode_num_draft_tokens_total"] == {
        labels: sum(drafted for drafted, _ in steps)
    }
    assert positions("vllm:spec_decode_num_accepted_tokens_per_pos_total") == [
        sum(accepted > k for _, accepted in steps) for k in range(K)
    ]
    assert positions(f"{PREFIX}num_draft_tokens_per_pos_total") == [
        sum(drafted > k for drafted, _ in steps) for k in range(K)
    ]
    for name, count in workers[0].items():
        if name.startswith("num_bytes_"):
            of = (*labels, ("of", name.removeprefix("num_bytes_")))
            assert samples[f"{PREFIX}draft_memory_bytes"][tuple(sorted(of))] == count
        else:
            assert samples[f"{PREFIX}{name}_total"] == {labels: count}
    # One request at a time: each verification was a step of its own.
    assert sum(count for name, count in workers[0].items() if "steps" in name) == len(steps)
    ((info, value),) = samples[f"{PREFIX}config_info"].items()
    assert value == 1
    assert (
        dict(info).items()
        >= {
            "engine": "0",
            "exit_layer": "3",
            "num_hidden_layers": "12",
            "num_speculative_tokens": str(K),
            "reuse_exit_states": "true",
            "vllm_layerskip_version": __version__,
        }.items()
    )
