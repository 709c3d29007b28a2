# SPDX-License-Identifier: Apache-2.0
"""The statistics, environments and processes of benchmarks.decode.cpu_runners."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.decode import cpu_runners


def test_prefill_and_the_end_are_no_steps():
    # Prefill ends at 5.0; four decoding steps; the last one only finishes requests.
    assert cpu_runners.median_step_ms([5.0, 7.0, 7.1, 7.3, 7.6, 9.0]) == 200.0


def test_the_shortest_runs_of_all_processes_are_compared():
    times = {("v1", 1): [[2.0, 9.0], [3.0]], ("v2", 1): [[8.0], [3.0, 4.0]]}
    times |= {("v1", 4): [[5.0]], ("v2", 4): [[4.0]]}
    records = [
        {"runner": runner, "batch_size": batch_size, "step_ms": step_ms}
        for (runner, batch_size), processes in times.items()
        for step_ms in processes
    ]
    assert cpu_runners.summarise(records) == [
        {"batch_size": 1, "step_ms": {"v1": 2.0, "v2": 3.0}, "v2_to_v1": 1.5},
        {"batch_size": 4, "step_ms": {"v1": 5.0, "v2": 4.0}, "v2_to_v1": 0.8},
    ]


@pytest.mark.parametrize("interpret", ["1", "0", None])
def test_each_runner_gets_its_own_environment(monkeypatch, interpret):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    v1, v2 = map(cpu_runners.environment, cpu_runners.RUNNERS)
    assert "TRITON_INTERPRET" not in v1
    assert v2["TRITON_INTERPRET"] == "1"
    assert (v1["VLLM_USE_V2_MODEL_RUNNER"], v2["VLLM_USE_V2_MODEL_RUNNER"]) == ("0", "1")
    # Everything else, threads above all, is alike.
    assert {key for key in v2 if v1.get(key) != v2[key]} == {
        "TRITON_INTERPRET",
        "VLLM_USE_V2_MODEL_RUNNER",
    }


def test_processes_take_turns(monkeypatch):
    order = []

    def run(command, **kwargs):
        order.append(command[command.index("--runner") + 1])
        return subprocess.CompletedProcess(command, 0, stdout="a warning\n[]\n")

    monkeypatch.setattr(cpu_runners.subprocess, "run", run)
    assert cpu_runners.measure_in_turn(["--tiny"], repeats=2) == []
    assert order == ["v1", "v2", "v1", "v2"]


def test_a_rehearsal_is_small():
    args = cpu_runners.parse(["--tiny"])
    assert (args.shape, args.repeats, args.runs) == ("tiny", 1, 1)
    assert cpu_runners.parse([]).shape == "llama-3.2-1b"
