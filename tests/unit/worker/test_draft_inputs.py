# SPDX-License-Identifier: Apache-2.0
"""Catch a draft pass that runs at a wrong position, drafts for a row that may not, or leaves a
padded row pointing at a request."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm_layerskip.worker.draft_inputs import advance, prepare_first_pass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_NUM_REQS, MAX_MODEL_LEN, VOCAB_SIZE = 6, 10, 50

_row = st.fixed_dictionaries(
    {
        # Only a dummy batch has rows without a request.
        "slot": st.integers(-1, MAX_NUM_REQS - 1),
        "seq_len": st.integers(1, MAX_MODEL_LEN),
        "num_sampled": st.integers(0, 3),
        "num_rejected": st.integers(0, 3),
    }
).map(lambda row: row | {"num_rejected": min(row["num_rejected"], row["seq_len"] - 1)})


def _int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _start(rows):
    """Buffers full of a former batch's values, and the first pass prepared over them."""
    buffers = InputBuffers(MAX_NUM_REQS, 32, DEVICE)
    buffers.input_ids.fill_(VOCAB_SIZE - 1)
    buffers.positions.fill_(7)
    buffers.seq_lens.fill_(8)
    buffers.query_start_loc[1:].fill_(99)
    idx_mapping = torch.full((MAX_NUM_REQS,), -1, dtype=torch.int64, device=DEVICE)
    idx_mapping[: len(rows)] = torch.tensor([row["slot"] for row in rows])
    last_sampled = torch.arange(MAX_NUM_REQS, device=DEVICE)[:, None] + 10
    prepare_first_pass(
        buffers,
        idx_mapping,
        _int32([row["seq_len"] for row in rows]),
        _int32([row["num_sampled"] for row in rows]),
        _int32([row["num_rejected"] for row in rows]),
        last_sampled,
        len(rows),
        MAX_MODEL_LEN,
    )
    return buffers, idx_mapping


@given(st.lists(_row, min_size=1, max_size=MAX_NUM_REQS))
def test_passes_follow_a_plain_model_of_the_rows(rows):
    buffers, idx_mapping = _start(rows)
    model = []
    for row in rows:
        position = row["seq_len"] - row["num_rejected"]
        drafts = row["slot"] >= 0 and row["num_sampled"] > 0 and position < MAX_MODEL_LEN
        model.append(
            {"slot": row["slot"], "token": row["slot"] + 10, "position": position}
            if drafts
            else None
        )
    draft_tokens = torch.full((MAX_NUM_REQS, 4), -7, device=DEVICE)
    num_reqs = len(rows)
    for step in range(4):
        starts = [min(index, num_reqs) for index in range(MAX_NUM_REQS + 1)]
        assert buffers.query_start_loc.tolist() == starts
        assert buffers.seq_lens[num_reqs:].tolist() == [0] * (MAX_NUM_REQS - num_reqs)
        assert idx_mapping[num_reqs:].tolist() == [-1] * (MAX_NUM_REQS - num_reqs)
        for index, row in enumerate(model):
            assert idx_mapping[index] == (-1 if row is None else row["slot"])
            assert 0 <= buffers.positions[index] < MAX_MODEL_LEN
            assert 1 <= buffers.seq_lens[index] <= MAX_MODEL_LEN
            if row is not None:
                assert buffers.input_ids[index] == row["token"]
                assert buffers.positions[index] == row["position"]
                assert buffers.seq_lens[index] == row["position"] + 1
        # What sampling leaves for rows that it skips is undefined.
        sampled = torch.tensor(
            [-12345 if row is None else 20 + step for row in model], device=DEVICE
        )
        advance(buffers, idx_mapping, sampled, draft_tokens[:, step], num_reqs, MAX_MODEL_LEN)
        for index, row in enumerate(model):
            assert draft_tokens[index, step] == (0 if row is None else 20 + step)
            if row is None:
                continue
            end = row["position"] + 1 == MAX_MODEL_LEN
            model[index] = (
                None if end else row | {"token": 20 + step, "position": row["position"] + 1}
            )
    assert (draft_tokens[num_reqs:] == -7).all()


@pytest.mark.parametrize("num_reqs", [1, 3, MAX_NUM_REQS])
def test_a_graphs_padded_rows_stay_out_of_a_smaller_batch(num_reqs):
    """A graph of 6 rows that replays for fewer advances its padded rows too."""
    row = {"slot": 2, "seq_len": 3, "num_sampled": 1, "num_rejected": 0}
    buffers, idx_mapping = _start([row] * num_reqs)
    draft_tokens = torch.zeros(MAX_NUM_REQS, device=DEVICE, dtype=torch.int64)
    sampled = torch.full((MAX_NUM_REQS,), 33, device=DEVICE)
    advance(buffers, idx_mapping, sampled, draft_tokens, MAX_NUM_REQS, MAX_MODEL_LEN)
    padding = MAX_NUM_REQS - num_reqs
    assert idx_mapping.tolist() == [2] * num_reqs + [-1] * padding
    assert buffers.seq_lens.tolist() == [5] * num_reqs + [0] * padding
    assert buffers.positions[:MAX_NUM_REQS].tolist() == [4] * num_reqs + [0] * padding
    assert draft_tokens.tolist() == [33] * num_reqs + [0] * padding
