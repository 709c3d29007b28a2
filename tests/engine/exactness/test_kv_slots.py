# SPDX-License-Identifier: Apache-2.0
"""Every K/V write of a run lands in its own request's block, at its own position.

A draft pass writes the target's cache, so a write to a block that was not reserved is another
request's wrong output (docs/tests.md, T6). The scheduler's own block lists are the reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest

BLOCK_SIZE = 32
NUM_SPECULATIVE_TOKENS = 5


@dataclass
class KVWrites:
    """Counts of checked writes, by who wrote."""

    engine: Any
    num_target: int = 0
    num_draft: int = 0
    num_first_of_a_block: int = 0
    """Drafts that are the first in their block, which only a lookahead reserves."""
    wrong: list[str] = field(default_factory=list)

    def check(self, slot_index: int, position: int, slot: int, draft: bool) -> None:
        runner, scheduler = self.engine.runner, self.engine.scheduler
        request_id = runner.req_states.index_to_req_id[slot_index]
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request_id)
        block = position // BLOCK_SIZE
        kind = "draft" if draft else "target"
        if block >= len(blocks):
            self.wrong.append(f"{kind}: position {position} has no block ({len(blocks)} reserved)")
        elif slot != blocks[block] * BLOCK_SIZE + position % BLOCK_SIZE:
            self.wrong.append(f"{kind}: position {position} went to slot {slot}")
        elif any(
            blocks[block] in scheduler.kv_cache_manager.get_block_ids(other.request_id)[0]
            for other in scheduler.running
            if other.request_id != request_id
        ):
            self.wrong.append(f"{kind}: block {blocks[block]} of position {position} is shared")
        # The sampled token's own position is the first that a draft may write.
        num_tokens = int(runner.req_states.total_len.gpu[slot_index])
        if draft and position < num_tokens - 1:
            self.wrong.append(f"draft: position {position} of {num_tokens} tokens is committed")
        self.num_draft += draft
        self.num_target += not draft
        self.num_first_of_a_block += draft and position % BLOCK_SIZE == 0


@contextlib.contextmanager
def checked_writes(engine: Any) -> Iterator[KVWrites]:
    writes = KVWrites(engine)
    runner, speculator = engine.runner, engine.runner.speculator
    prepare_attn, draft_slots = runner.prepare_attn, speculator._compute_slot_mappings

    def checking_prepare_attn(input_batch: Any) -> Any:
        block_tables, slot_mappings = prepare_attn(input_batch)
        starts = input_batch.query_start_loc_np
        for row, slot_index in enumerate(input_batch.idx_mapping_np.tolist()):
            for token in range(starts[row], starts[row + 1]):
                position, slot = input_batch.positions[token], slot_mappings[0, token]
                writes.check(slot_index, int(position), int(slot), draft=False)
        return block_tables, slot_mappings

    def checking_draft_slots(num_reqs: int) -> Any:
        slot_mappings = draft_slots(num_reqs)
        for row, slot_index in enumerate(speculator.idx_mapping[:num_reqs].tolist()):
            slot = int(slot_mappings[0, row])
            if slot_index < 0:
                if slot != -1:
                    writes.wrong.append(f"draft: a row that drafts nothing wrote to {slot}")
                continue
            position = int(speculator.input_buffers.positions[row])
            writes.check(slot_index, position, slot, draft=True)
        return slot_mappings

    with (
        mock.patch.object(runner, "prepare_attn", checking_prepare_attn),
        mock.patch.object(speculator, "_compute_slot_mappings", checking_draft_slots),
    ):
        yield writes


def start(pool, checkpoint, **settings):
    return pool.layerskip(
        checkpoint,
        3,
        NUM_SPECULATIVE_TOKENS,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,  # A block of the prefix cache is shared on purpose.
        **settings,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"async_scheduling": True},
        {"num_gpu_blocks_override": 13},
        {"num_gpu_blocks_override": 13, "async_scheduling": True, "max_num_batched_tokens": 48},
    ],
    ids=["sync", "async", "preemption", "async-preemption-chunks"],
)
def test_every_write_has_a_place_of_its_own(pool, checkpoint, prompts, settings):
    engine = start(pool, checkpoint, **settings)
    assert engine.vllm_config.num_lookahead_tokens >= NUM_SPECULATIVE_TOKENS
    # Prompts that end at, before and after the end of a block.
    batch = [prompts[2][:length] for length in (27, 31, 32, 33, 62, 64, 90)]
    with checked_writes(engine) as writes, engine.counting() as counts:
        tokens = engine.greedy(batch, max_tokens=70)
    assert writes.wrong == []
    assert writes.num_draft > 500
    assert writes.num_target > 500
    assert writes.num_first_of_a_block > 5
    counts.assert_speculated()
    assert (counts.num_preemptions > 0) == ("num_gpu_blocks_override" in settings)
    plain = pool.get(checkpoint, block_size=BLOCK_SIZE, enable_prefix_caching=False)
    assert tokens == plain.greedy(batch, max_tokens=70)


def test_a_missing_lookahead_is_seen(pool, checkpoint, prompts):
    """Negative control: without the K reserved slots drafts do write to other blocks."""
    engine = start(pool, checkpoint)
    with (
        mock.patch.object(engine.scheduler, "num_lookahead_tokens", 0),
        checked_writes(engine) as writes,
    ):
        engine.greedy([prompts[2][:31]], max_tokens=40)
    assert any("has no block" in problem for problem in writes.wrong)
