# SPDX-License-Identifier: Apache-2.0
"""Catch exit states that land in, or are read from, the wrong place, and a request that is
served its slot's former owner's states."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.worker.exit_states import ExitStates

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS, NUM_DRAFTS = 6, 3


def _exit_states(hidden_size=4, dtype=torch.float32):
    """A buffer full of old values, as it is in the middle of a run."""
    buffer = ExitStates(NUM_SLOTS, NUM_DRAFTS, hidden_size, dtype, DEVICE)
    buffer.states.copy_(torch.randn(buffer.states.shape))
    return buffer


@pytest.mark.parametrize("hidden_size", [5, 64, 192])
@pytest.mark.parametrize(
    ("slots", "step"),
    [
        ([4, 1, 3], 0),
        ([0], 2),
        ([5, -1, 2, -1], 1),
        ([-1, -1], 0),
        ([5, 4, 3, 2, 1, 0], 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_writes_each_rows_state_to_its_slot_and_step_alone(hidden_size, slots, step, dtype):
    buffer = _exit_states(hidden_size, dtype)
    expected = buffer.states.clone()
    # A batch's tensors are views of larger ones: more rows than requests, padded strides.
    hidden_states = torch.randn(len(slots) + 2, hidden_size + 3).to(DEVICE, dtype)[:, :hidden_size]
    residual = torch.randn(len(slots) + 2, hidden_size).to(DEVICE, dtype)
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[0, slot, step] = hidden_states[row]
            expected[1, slot, step] = residual[row]
    idx_mapping = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    buffer.store(step, idx_mapping, hidden_states, residual)
    torch.testing.assert_close(buffer.states, expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_drafts", range(1, NUM_DRAFTS + 1))
def test_store_all_keeps_every_rows_tokens_but_the_last(num_drafts):
    slots, num_tokens_per_req = [2, -1, 5], num_drafts + 1
    buffer = _exit_states()
    expected = buffer.states.clone()
    tokens = torch.randn(2, len(slots) * num_tokens_per_req, 4).to(DEVICE)
    for row, slot in enumerate(slots):
        if slot >= 0:
            first = row * num_tokens_per_req
            expected[:, slot, :num_drafts] = tokens[:, first : first + num_drafts]
    idx_mapping = torch.tensor(slots, device=DEVICE)
    buffer.store_all(idx_mapping, tokens[0], tokens[1], num_drafts)
    torch.testing.assert_close(buffer.states, expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_drafts", range(1, NUM_DRAFTS + 1))
@pytest.mark.parametrize("slots", [[2], [3, 0, 5], [4, -1, 1], [0, 1, 2, 3, 4, 5], [-1]])
@pytest.mark.parametrize("num_padding_tokens", [0, 5])
@pytest.mark.parametrize("hidden_size", [4, 7])
def test_a_verify_step_reads_what_the_draft_passes_of_the_same_request_stored(
    slots, num_drafts, num_padding_tokens, hidden_size
):
    buffer = _exit_states(hidden_size)
    idx_mapping = torch.tensor(slots, device=DEVICE)
    passes = torch.randn(2, NUM_DRAFTS, len(slots), hidden_size).to(DEVICE)
    for step in range(num_drafts):
        buffer.store(step, idx_mapping, passes[0, step], passes[1, step])
    last = torch.randn(2, len(slots), hidden_size).to(DEVICE)
    num_tokens = len(slots) * (num_drafts + 1) + num_padding_tokens
    gathered = buffer.gather(idx_mapping, num_drafts, last[0], last[1], num_tokens)
    expected = torch.zeros(2, num_tokens, hidden_size, device=DEVICE)
    for row, slot in enumerate(slots):
        if slot >= 0:
            first = row * (num_drafts + 1)
            expected[:, first : first + num_drafts] = passes[:, :num_drafts, row]
            expected[:, first + num_drafts] = last[:, row]
    torch.testing.assert_close(torch.stack(gathered), expected, rtol=0, atol=0)


def test_gather_returns_copies_that_the_caller_may_overwrite():
    buffer = _exit_states()
    before = buffer.states.clone()
    last = torch.randn(2, 4).to(DEVICE)
    idx_mapping = torch.tensor([1, 2], device=DEVICE)
    for state in buffer.gather(idx_mapping, NUM_DRAFTS, last, last, 2 * (NUM_DRAFTS + 1)):
        state.zero_()
    torch.testing.assert_close(buffer.states, before, rtol=0, atol=0)


def test_the_buffer_takes_as_many_bytes_as_it_says():
    buffer = ExitStates(7, 5, 64, torch.bfloat16, DEVICE)
    assert buffer.num_bytes == 2 * 7 * 5 * 64 * 2
    assert buffer.states.element_size() * buffer.states.numel() == buffer.num_bytes


def test_a_new_buffer_covers_nobody():
    buffer = ExitStates(NUM_SLOTS, NUM_DRAFTS, 4, torch.float32, DEVICE)
    assert not any(buffer.cover(np.array([slot]), 1) for slot in range(NUM_SLOTS))


def test_a_batch_is_covered_only_if_every_row_is():
    buffer = _exit_states()
    # Rows 0 and 2 drafted; row 1 was in the middle of its prefill.
    buffer.set_num_valid(np.array([4, 0, 2]), np.array([3, 0, 3]))
    assert buffer.cover(np.array([2, 4]), 3)
    assert not buffer.cover(np.array([2, 4, 0]), 3)
    assert not buffer.cover(np.array([2, 4, 0]), 1)
    assert not buffer.cover(np.array([1]), 1)


_slots = st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=NUM_SLOTS, unique=True)
_events = st.lists(
    st.tuples(st.just("new owner"), st.integers(0, NUM_SLOTS - 1))
    | st.tuples(st.just("propose"), _slots, st.integers(0, NUM_DRAFTS)),
    max_size=12,
)


def _drafts_of(slot, events):
    """Passes of the slot's last propose, 0 if it changed hands since: the log read backwards."""
    for event in reversed(events):
        if event[0] == "new owner" and event[1] == slot:
            return 0
        if event[0] == "propose" and slot in event[1]:
            return event[2]
    return 0


@given(_events, _slots, st.integers(1, NUM_DRAFTS))
def test_rows_are_covered_by_their_own_last_propose_and_nothing_older(events, rows, num_drafts):
    buffer = ExitStates(NUM_SLOTS, NUM_DRAFTS, 1, torch.float32, DEVICE)
    for event in events:
        if event[0] == "new owner":
            buffer.invalidate(event[1])
        else:
            buffer.set_num_valid(np.array(event[1]), event[2])
    expected = all(_drafts_of(slot, events) >= num_drafts for slot in rows)
    assert buffer.cover(np.array(rows), num_drafts) is expected
