# SPDX-License-Identifier: Apache-2.0
"""Drafting, verify planning and the forward with reuse never wait for the device.

Catches a host read that would make every step wait for the GPU and undo async scheduling. On
a GPU: ``python -m pytest -m gpu tests/engine/graphs/test_no_sync.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from engines import ON_GPU
from host_reads import HostReads, watch

PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40, 9, 30)]
# Chunks mix prefill rows with decodes; five requests take turns in four slots.
SETTINGS = {"max_num_batched_tokens": 32, "enable_prefix_caching": False}


@pytest.fixture(scope="module", autouse=True)
def _warm(pool, random_checkpoint):
    """First steps compile and allocate, and may wait."""
    pool.get(random_checkpoint, **SETTINGS).greedy(PROMPTS, 20)
    for reuse in (True, False):
        start(pool, random_checkpoint, reuse).greedy(PROMPTS, 20)


def start(pool: Any, checkpoint: Any, reuse: bool = True) -> Any:
    return pool.layerskip(checkpoint, 2, 3, spec={"reuse_exit_states": reuse}, **SETTINGS)


def run(engine: Any) -> HostReads:
    with watch(engine) as seen, engine.counting() as counts:
        engine.greedy(PROMPTS, 20)
    counts.assert_speculated()
    reuse = engine.vllm_config.speculative_config.reuse_exit_states
    assert (counts.num_verify_steps_reused > 0) == reuse
    # A full graph replays the forward without calling it.
    assert seen.calls >= {
        "propose",
        "prepare_attn",
        "prepare_inputs",
        *([] if ON_GPU else ["forward"]),
    }
    return seen


@pytest.mark.parametrize(
    "reuse",
    [pytest.param(reuse, marks=[pytest.mark.gpu] if ON_GPU else []) for reuse in (True, False)],
    ids=["reuse", "no-reuse"],
)
def test_no_step_waits_for_the_device(pool, random_checkpoint, reuse):
    seen = run(start(pool, random_checkpoint, reuse))
    engine = pool.get(random_checkpoint, **SETTINGS)
    with watch(engine) as plain:
        engine.greedy(PROMPTS, 20)
    # Waits that plain decoding has as well are vLLM's own.
    added = {place: seen.reads[place] for place in seen.reads.keys() - plain.reads.keys()}
    assert added == {}
    if not ON_GPU:
        assert plain.reads == {}


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda tensor: tensor.max().item(),
    "int": lambda tensor: int(tensor[0]),
    "bool": lambda tensor: bool((tensor >= 0).all()),
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
    "to": lambda tensor: tensor.to("cpu"),
    "nonzero": lambda tensor: tensor.nonzero(),
    "mask": lambda tensor: tensor[tensor >= 0],
    "masked_write": lambda tensor: tensor.clone().__setitem__(
        tensor < 0, torch.zeros_like(tensor[:1])
    ),
    "masked_select": lambda tensor: tensor.masked_select(tensor >= 0),
    "where": lambda tensor: torch.where(tensor >= 0),
    "repeat_interleave": lambda tensor: tensor.repeat_interleave(tensor.clamp(min=0)),
    "unique": lambda tensor: tensor.unique(),
    "equal": lambda tensor: torch.equal(tensor, tensor + 1),
    "of a copy": lambda tensor: (tensor.clone() + 1).clamp(min=0)[0].item(),
}


@pytest.mark.skipif(ON_GPU, reason="captured graphs call no Python")
@pytest.mark.parametrize("read", READS)
def test_a_read_in_a_draft_pass_is_seen(pool, random_checkpoint, read):
    """Negative control: each way to wait is seen, put where exit states are stored."""
    engine = start(pool, random_checkpoint)
    states = engine.runner.model_state.draft_state.exit_states
    store = states.store

    def store_and_read(step, idx_mapping, *args, **kwargs):
        READS[read](idx_mapping)
        return store(step, idx_mapping, *args, **kwargs)

    with mock.patch.object(states, "store", store_and_read):
        seen = run(engine)
    assert seen.reads
    assert all("test_no_sync" in place for place in seen.reads)
