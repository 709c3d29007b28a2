# SPDX-License-Identifier: Apache-2.0
"""Which decode graphs an engine with a batch-size schedule captures and offers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_layerskip.worker.decode_graphs import _keep_scheduled, _offer_all

SCHEDULE = [[1, 8, 12], [9, 32, 6], [33, 127, 3], [128, 128, 0]]
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


def manager(full: list[BatchExecutionDescriptor] | None) -> SimpleNamespace:
    """vLLM's manager, as far as these functions know it."""
    config = SimpleNamespace(
        uses_dynamic_speculative_decoding=lambda: True,
        num_speculative_tokens_per_batch_size=SCHEDULE,
        num_speculative_tokens=12,
    )
    vllm_config = SimpleNamespace(
        speculative_config=config, scheduler_config=SimpleNamespace(max_num_seqs=128)
    )
    descs = {} if full is None else {CUDAGraphMode.FULL: full}
    return SimpleNamespace(vllm_config=vllm_config, _capture_descs=descs, _candidates={})


def graph(num_reqs: int, q: int) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL,
        num_tokens=num_reqs * q,
        num_reqs=num_reqs,
        uniform_token_count=q,
    )


@pytest.fixture
def kept():
    """What is kept of vLLM's graphs, which are one of every size for every query length."""
    every = [graph(size, q) for q in (1, 4, 7, 13) for size in SIZES]
    one = manager(sorted(every, key=lambda desc: desc.num_tokens, reverse=True))
    _keep_scheduled(one)
    return one._capture_descs[CUDAGraphMode.FULL]


def test_every_batch_on_schedule_has_the_graph_that_it_had(kept):
    num_drafts = {n: k for first, last, k in SCHEDULE for n in range(first, last + 1)}
    for num_reqs, k in num_drafts.items():
        smallest = min(size for size in SIZES if size >= num_reqs)
        assert graph(smallest, 1 + k) in kept, num_reqs


def test_a_batch_that_shrank_since_it_drafted_still_has_one(kept):
    for first, last, k in SCHEDULE:
        sizes = [desc.num_reqs for desc in kept if desc.uniform_token_count == 1 + k]
        assert max(sizes) >= last
        for num_reqs in range(1, first):
            assert any(size >= num_reqs for size in sizes)


def test_what_no_batch_asks_for_is_dropped_but_one_request(kept):
    assert {(desc.num_reqs, desc.uniform_token_count) for desc in kept} == {
        *((1, q) for q in (1, 4, 7, 13)),
        *((size, 13) for size in (2, 4, 8)),
        *((size, 7) for size in (16, 24, 32)),
        *((size, 4) for size in (48, 64, 96, 128)),
        (128, 1),
    }
    tokens = [desc.num_tokens for desc in kept]
    assert tokens == sorted(tokens, reverse=True), "vLLM captures the largest first"


@pytest.mark.parametrize("full", [None, []])
def test_without_full_graphs_there_is_nothing_to_capture(full):
    """vLLM captures, and locks its workspaces, as soon as there is an entry."""
    one = manager(full)
    before = dict(one._capture_descs)
    _keep_scheduled(one)
    assert one._capture_descs == before


def test_graphs_of_mixed_batches_stay():
    mixed = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=64, num_reqs=64)
    one = manager([mixed])
    _keep_scheduled(one)
    assert one._capture_descs[CUDAGraphMode.FULL] == [mixed]


def test_a_batch_is_offered_every_graph_that_is_large_enough():
    piecewise = BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.PIECEWISE, num_tokens=4, num_reqs=None
    )
    one = manager([graph(4, 1), graph(1, 3), graph(2, 3)])
    one._candidates = {(3, 0): [graph(1, 3), piecewise], (9, 0): []}
    _offer_all(one)
    assert one._candidates == {
        (3, 0): [graph(1, 3), graph(4, 1), graph(2, 3), piecewise],
        (9, 0): [],
    }
