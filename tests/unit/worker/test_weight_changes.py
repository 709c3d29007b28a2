# SPDX-License-Identifier: Apache-2.0
"""Catch a call that may change weights and is not announced, one that is announced for nothing,
and an engine that never asked for LayerSkip and gets announcements."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.executor.abstract import Executor

from vllm_layerskip.config.layerskip_config import LayerSkipConfig
from vllm_layerskip.worker import weight_changes
from vllm_layerskip.worker.weight_changes import LEAVE_WEIGHTS_ALONE, watch_executors


class Ranks(Executor):
    """An executor of somebody else's, with two workers that run every call."""

    def __init__(self, speculative_config: Any) -> None:
        self.speculative_config = speculative_config
        self.models = [SimpleNamespace(num_weight_changes=1) for _ in range(2)]
        self.calls: list[Any] = []

    def _init_executor(self) -> None:
        raise NotImplementedError

    def check_health(self) -> None:
        raise NotImplementedError

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None):
        self.calls.append(method)
        workers = [SimpleNamespace(get_model=lambda model=model: model) for model in self.models]
        if callable(method):
            return [method(worker, *args) for worker in workers]
        return [method for _ in workers]


@pytest.fixture
def layerskip():
    watch_executors()
    watch_executors()  # Once an engine; a call is announced once.
    return Ranks(object.__new__(LayerSkipConfig))


def counts(executor: Ranks) -> list[int]:
    return [model.num_weight_changes for model in executor.models]


@pytest.mark.parametrize(
    "method",
    [
        "reload_weights",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "sleep",
        "wake_up",
        "discard",
        "add_lora",
        "remove_lora",
        "pin_lora",
        "apply_model",
        "update_config",
        "a_method_of_a_worker_extension",
    ],
)
def test_a_call_that_may_change_weights_is_announced_first_on_every_rank(layerskip, method):
    assert layerskip.collective_rpc(method, args=()) == [method, method]
    assert layerskip.calls == [weight_changes.count_weight_change, method]
    assert counts(layerskip) == [2, 2]


def test_a_function_of_a_user_is_announced(layerskip):
    def change_one_rank(worker: Any) -> int:
        return worker.get_model().num_weight_changes

    assert layerskip.collective_rpc(change_one_rank) == [2, 2]


@pytest.mark.parametrize("method", sorted(LEAVE_WEIGHTS_ALONE))
def test_other_calls_are_not(layerskip, method):
    layerskip.collective_rpc(method)
    assert layerskip.calls == [method]
    assert counts(layerskip) == [1, 1]


@pytest.mark.parametrize("speculative_config", [None, SimpleNamespace(method="ngram")])
def test_engines_without_layerskip_are_left_alone(speculative_config):
    watch_executors()
    executor = Ranks(speculative_config)
    executor.collective_rpc("reload_weights")
    assert executor.calls == ["reload_weights"]


def test_a_call_that_fails_was_announced(layerskip):
    def fails(worker: Any) -> None:
        raise RuntimeError("half of the weights are written")

    with pytest.raises(RuntimeError, match="half"):
        layerskip.collective_rpc(fails)
    assert counts(layerskip) == [2, 2]


@pytest.mark.parametrize(
    "name",
    [
        "multiproc_executor:MultiprocExecutor",
        "uniproc_executor:UniProcExecutor",
        "uniproc_executor:ExecutorWithExternalLauncher",
        "ray_executor:RayDistributedExecutor",
        "ray_executor_v2:RayExecutorV2",
    ],
)
def test_every_executor_of_vllm_is_watched(name):
    module, _, attribute = name.partition(":")
    imported = pytest.importorskip(f"vllm.v1.executor.{module}")
    watch_executors()
    collective_rpc = getattr(imported, attribute).collective_rpc
    assert collective_rpc.__wrapped__.__module__.startswith("vllm.v1.executor.")


def test_the_calls_that_leave_weights_alone_exist_in_vllm():
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    owners = (Worker, WorkerWrapperBase)
    ray_only = {"adjust_rank"}
    missing = {
        name
        for name in LEAVE_WEIGHTS_ALONE - ray_only
        if not any(hasattr(owner, name) for owner in owners)
    }
    assert missing == set()


def test_an_announcement_takes_no_longer_than_its_call(layerskip, monkeypatch):
    seen = []
    original = Ranks.collective_rpc.__wrapped__

    def timed(self, method, timeout=None, args=(), kwargs=None):
        seen.append(timeout)
        return original(self, method, timeout, args, kwargs)

    monkeypatch.setattr(Ranks, "collective_rpc", weight_changes._collective_rpc(timed))
    layerskip.collective_rpc("reload_weights", timeout=1.5)
    layerskip.collective_rpc("reload_weights", 2.5)
    layerskip.collective_rpc("reload_weights")
    assert seen == [1.5, 1.5, 2.5, 2.5, None, None]
