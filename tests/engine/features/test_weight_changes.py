# SPDX-License-Identifier: Apache-2.0
"""Weights that change while requests run, and between them, in every way that vLLM 0.32 has.

Catches exit states and a draft head that outlive the weights that they were made from. Plain vLLM
makes the same change after the same number of tokens, and all tokens must be equal.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import EMBEDDED
from safetensors.torch import load_file, save_file
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from vllm_layerskip.worker import weight_changes
from vllm_layerskip.worker.model_state import LayerSkipModelState

MAX_TOKENS = 40
MIN_TOKENS = 9
NOISE = 0.5
IN_PLACE = ("norm.weight", "embed_tokens.weight")
"""Ends of the names of weights that vLLM's CPU kernels read where they are. They pack the others
when they are loaded, and plain vLLM, too, does not notice a later write."""
SETTINGS: dict[str, Any] = {"enable_prefix_caching": False}


def noisy(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The same new values wherever they are made."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    factor = 1 + NOISE * torch.randn(weight.shape, generator=generator)
    return weight * factor.to(weight.device, weight.dtype)


def changed(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """New values of the weights that can be written in place."""
    return [
        (name, noisy(name, parameter.detach()))
        for name, parameter in model.named_parameters()
        if name.endswith(IN_PLACE)
    ]


@torch.no_grad()
def write(model: torch.nn.Module) -> None:
    for name, value in changed(model):
        model.get_parameter(name).copy_(value)


def write_data(model: torch.nn.Module) -> None:
    """As a transfer does that bypasses ``load_weights``: no version counter sees it."""
    for name, value in changed(model):
        model.get_parameter(name).data.copy_(value)


@dataclasses.dataclass
class NoInfo(WeightTransferInitInfo, WeightTransferUpdateInfo):
    pass


class InPlaceTransfer(WeightTransferEngine[NoInfo, NoInfo]):
    """Stands for vLLM's backends that write the engine's own tensors (nccl_m2n, sharded_rdt)."""

    init_info_cls = update_info_cls = NoInfo

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def receive_weights(self, update_info: NoInfo) -> None:
        write_data(self.model)


class LoadingTransfer(InPlaceTransfer):
    """Stands for those that call ``load_weights`` (nccl, ipc)."""

    def receive_weights(self, update_info: NoInfo) -> None:
        self.model.load_weights(iter(changed(self.model)))


for backend in (InPlaceTransfer, LoadingTransfer):
    WeightTransferEngineFactory.register_engine(backend.__name__, backend)


def reload_from_disk(engine) -> None:
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": engine.noisy_checkpoint})


def reload_in_kernel_format(engine) -> None:
    @torch.no_grad()
    def reload(worker: Any) -> None:
        worker.reload_weights(
            weights_iterator=changed(worker.get_model()), is_checkpoint_format=False
        )

    engine.llm.collective_rpc(reload)


def transfer(backend: type) -> Callable:
    def change(engine) -> None:
        # As load_model does for an engine with a weight_transfer_config.
        engine.worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend.__name__),
            engine.vllm_config,
            engine.worker.device,
            engine.worker.get_model(),
        )
        rpc = engine.llm.collective_rpc
        rpc("start_weight_update")
        rpc("update_weights", args=({},))
        rpc("finish_weight_update")

    return change


def sleep_and_wake(level: int) -> Callable:
    def change(engine) -> None:
        """A CPU has no sleep mode: the weights come back changed, as if somebody replaced them."""

        def wake_up(worker: Any, tags: list[str] | None = None) -> None:
            write_data(worker.get_model())

        with mock.patch.object(type(engine.worker), "wake_up", wake_up):
            engine.llm.sleep(level=level, mode="keep")
            engine.llm.wake_up()

    return change


CHANGES: dict[str, Callable] = {
    "reload": reload_from_disk,
    "reload in kernel format": reload_in_kernel_format,
    "transfer by load_weights": transfer(LoadingTransfer),
    "transfer in place": transfer(InPlaceTransfer),
    "apply_model": lambda engine: engine.llm.apply_model(write),
    "collective_rpc": lambda engine: engine.llm.collective_rpc(
        lambda worker: write_data(worker.worker.model_runner.model)
    ),
    "sleep level 1": sleep_and_wake(1),
    "sleep level 2": sleep_and_wake(2),
}


WRITE_IN_PLACE = ("reload in kernel format", "transfer in place", "apply_model", "collective_rpc")
"""They call no ``load_weights``."""
MUCH_LIKE_OTHERS = ("sleep level 1", "transfer by load_weights")
"""Of a level 2 sleep and a reload, which always run."""
COMPUTED_AGAIN = ("sleep level 1", "sleep level 2")
"""vLLM discards the K/V, and computes requests that it keeps from their first token."""


@pytest.fixture(scope="module")
def noisy_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy") / "model"
    folder.mkdir()
    for path in EMBEDDED.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    weights = load_file(EMBEDDED / "model.safetensors")
    weights = {
        name: noisy(name, weight).contiguous() if "proj" in name else weight
        for name, weight in weights.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engines(pool, checkpoint, noisy_checkpoint):
    spec = {"draft_vocab": "none"}
    engines = {
        "plain": pool.get(checkpoint, **SETTINGS),
        "no reuse": pool.layerskip(
            checkpoint, 3, 4, spec=spec | {"reuse_exit_states": False}, **SETTINGS
        ),
        "default": pool.layerskip(checkpoint, 3, 4, spec=spec, **SETTINGS),
    }
    for engine in engines.values():
        prepare(engine, noisy_checkpoint)
    return engines


def prepare(engine, noisy_checkpoint) -> None:
    engine.noisy_checkpoint = str(noisy_checkpoint)
    engine.worker = engine.llm.collective_rpc(lambda worker: worker.worker)[0]


def run_through(engine, prompt, change, num_tokens: int) -> tuple[int, list[int]]:
    """Change weights after the first step that gives ``num_tokens`` tokens or more.

    Returns the number of tokens by then, and all tokens.
    """
    engine.start("request", prompt, MAX_TOKENS)
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens = engine.step().get("request", tokens)
    change(engine)
    return len(tokens), engine.run_to_end()["request"]


def answers(engine, prompts, change, num_tokens):
    """What ``run_through`` gives for each prompt, one after another, from the same weights."""
    found = []
    for prompt, number in zip(prompts, num_tokens, strict=True):
        # With this checkpoint a reload does not pass over any weight that was written in place.
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(EMBEDDED)})
        with engine.counting() as counts:
            found.append(run_through(engine, prompt, change, number))
        if engine.vllm_config.speculative_config is not None:
            counts.assert_speculated()
    return [number for number, _ in found], [tokens for _, tokens in found]


def missed(name: str):
    """The change goes unnoticed."""
    if name in WRITE_IN_PLACE:
        return mock.patch.object(weight_changes, "count_weight_change", return_value=None)
    return mock.patch.object(LayerSkipModelState, "_forget_other_weights", return_value=None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in MUCH_LIKE_OTHERS else ())
        for name in CHANGES
    ],
)
def test_weights_that_change_in_flight(engines, prompts, name):
    prompts, change = [prompts[number] for number in (0, 2, 3)], CHANGES[name]
    at_least = [MIN_TOKENS] * len(prompts)
    counts, tokens = answers(engines["default"], prompts, change, at_least)
    assert answers(engines["no reuse"], prompts, change, at_least) == (counts, tokens)
    assert answers(engines["plain"], prompts, change, counts)[1] == tokens
    # The control: had the change been missed, it would be seen.
    if name in COMPUTED_AGAIN:
        assert answers(engines["plain"], prompts, lambda engine: None, counts)[1] != tokens
        return
    with missed(name):
        assert answers(engines["default"], prompts, change, at_least)[1] != tokens


def test_only_a_call_that_may_change_weights_costs_a_step_its_reuse(engines, prompts):
    engine = engines["default"]
    engine.start("request", prompts[0], MAX_TOKENS)
    counts = engine.worker.model_runner.model_state
    changes = engine.worker.get_model().num_weight_changes
    for _ in range(3):
        engine.step()
    full = counts.step_counts.num_verify_steps_full
    engine.core.model_executor.check_health()
    engine.llm.reset_mm_cache()
    engine.step()
    assert counts.step_counts.num_verify_steps_full == full
    assert engine.worker.get_model().num_weight_changes == changes
    engine.llm.collective_rpc(lambda worker: None)
    assert engine.worker.get_model().num_weight_changes == changes + 1
    engine.step()
    engine.step()
    assert counts.step_counts.num_verify_steps_full == full + 1
    engine.run_to_end()


@pytest.fixture(scope="module")
def with_draft_head(pool, checkpoint, noisy_checkpoint, tmp_path_factory):
    ids = tmp_path_factory.mktemp("ids") / "ids.json"
    ids.write_text(json.dumps(list(range(0, 1024, 2))))
    engine = pool.layerskip(checkpoint, 3, 4, spec={"draft_vocab": str(ids)}, **SETTINGS)
    prepare(engine, noisy_checkpoint)
    return engine


@pytest.mark.parametrize("name", ["reload", *WRITE_IN_PLACE])
def test_weights_that_change_between_requests(engines, with_draft_head, prompts, name):
    """A draft head is a copy of weights."""
    tokens = []
    for engine in (with_draft_head, engines["plain"]):
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(EMBEDDED)})
        before = engine.greedy(prompts[:2], MAX_TOKENS)
        with engine.counting() as counts:
            CHANGES[name](engine)
            tokens.append(engine.greedy(prompts[:2], MAX_TOKENS))
        assert tokens[-1] != before
        if engine is with_draft_head:
            counts.assert_speculated()
            assert draft_head_is_fresh(engine)
    assert tokens[0] == tokens[1]


def draft_head_is_fresh(engine) -> bool:
    head = engine.worker.model_runner.speculator.draft_head
    rows = engine.worker.get_model().lm_head.weight[head.token_ids]
    return torch.equal(head.lm_head.weight[: len(rows)], rows)


def test_a_missed_change_would_leave_an_old_draft_head(with_draft_head, prompts):
    """The control."""
    with_draft_head.llm.collective_rpc("reload_weights")
    with_draft_head.greedy(prompts[:1], 8)
    assert draft_head_is_fresh(with_draft_head)
    with missed("apply_model"):
        with_draft_head.llm.apply_model(write)
        with_draft_head.greedy(prompts[:1], 8)
        assert not draft_head_is_fresh(with_draft_head)
