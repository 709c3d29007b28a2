# SPDX-License-Identifier: Apache-2.0
"""Inputs of the draft passes, written on the device: one kernel before the first pass, one
after each.

Rows of a batch are R requests, then padding. A row drafts while its ``idx_mapping`` is not
-1. A row that does not draft keeps its position and writes neither K/V nor exit states.

Both kernels have one compiled variant: what changes from step to step is not specialised, and
blocks have one size. Triton would otherwise compile while requests wait, for each new class of
batch sizes.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.input_batch import InputBuffers

ROWS_PER_PROGRAM = 128


def prepare_first_pass(
    input_buffers: InputBuffers,
    idx_mapping: torch.Tensor,  # [max_num_reqs]
    target_seq_lens: torch.Tensor,  # [>= R]
    num_sampled: torch.Tensor,  # [R]
    num_rejected: torch.Tensor,  # [R]
    last_sampled: torch.Tensor,  # [max_num_reqs, 1], by request slot
    num_reqs: int,
    max_model_len: int,
) -> None:
    """Have each row draft from the token that was just sampled, at that token's own position.

    A row drafts nothing if nothing was sampled for it or its token has no position left.
    """
    max_num_reqs = idx_mapping.shape[0]
    _prepare_first_pass_kernel[(triton.cdiv(max_num_reqs, ROWS_PER_PROGRAM),)](
        idx_mapping,
        input_buffers.input_ids,
        input_buffers.positions,
        input_buffers.seq_lens,
        input_buffers.query_start_loc,
        target_seq_lens,
        num_sampled,
        num_rejected,
        last_sampled,
        num_reqs,
        max_num_reqs,
        max_model_len,
        BLOCK_SIZE=ROWS_PER_PROGRAM,
    )


def advance(
    input_buffers: InputBuffers,
    idx_mapping: torch.Tensor,  # [max_num_reqs]
    sampled: torch.Tensor,  # [R]
    draft_tokens: torch.Tensor,  # [max_num_reqs], one step's column
    num_reqs: int,
    max_model_len: int,
) -> None:
    """Keep a pass's draft tokens and make them the next pass's inputs, one position on.

    A row stops past the model's last position: it must not overwrite a real token.
    """
    _advance_kernel[(triton.cdiv(num_reqs, ROWS_PER_PROGRAM),)](
        idx_mapping,
        input_buffers.input_ids,
        input_buffers.positions,
        input_buffers.seq_lens,
        sampled,
        draft_tokens,
        draft_tokens.stride(0),
        num_reqs,
        max_model_len,
        BLOCK_SIZE=ROWS_PER_PROGRAM,
    )


@triton.jit(do_not_specialize=["num_reqs"])
def _prepare_first_pass_kernel(  # type: ignore[no-untyped-def]
    idx_mapping_ptr,  # [max_num_reqs]
    input_ids_ptr,
    positions_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,  # [max_num_reqs + 1]
    target_seq_lens_ptr,
    num_sampled_ptr,
    num_rejected_ptr,
    last_sampled_ptr,
    num_reqs,
    max_num_reqs,
    max_model_len,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    in_buffer = row < max_num_reqs
    in_batch = row < num_reqs
    req_state_idx = tl.load(idx_mapping_ptr + row, mask=in_batch, other=-1)
    num_sampled = tl.load(num_sampled_ptr + row, mask=in_batch, other=0)
    num_rejected = tl.load(num_rejected_ptr + row, mask=in_batch, other=0)
    # After the accepted tokens: the sampled token's own position.
    position = tl.load(target_seq_lens_ptr + row, mask=in_batch, other=0) - num_rejected
    drafts = (req_state_idx >= 0) & (num_sampled > 0) & (position < max_model_len)
    token = tl.load(last_sampled_ptr + req_state_idx, mask=drafts, other=0)
    position = tl.where(drafts, position, 0)
    tl.store(idx_mapping_ptr + row, tl.where(drafts, req_state_idx, -1), mask=in_buffer)
    tl.store(input_ids_ptr + row, token, mask=in_buffer)
    tl.store(positions_ptr + row, position, mask=in_buffer)
    # A request that drafts nothing attends to one (stale) token; its result is not used.
    tl.store(seq_lens_ptr + row, tl.where(in_batch, position + 1, 0), mask=in_buffer)
    # Padding has no query. The buffer was made with 0 as its first start.
    tl.store(query_start_loc_ptr + row + 1, tl.minimum(row + 1, num_reqs), mask=in_buffer)


# A pass's column of the draft tokens starts at any multiple of 8 bytes.
@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=["draft_tokens_ptr"])
def _advance_kernel(  # type: ignore[no-untyped-def]
    idx_mapping_ptr,  # [max_num_reqs]
    input_ids_ptr,
    positions_ptr,
    seq_lens_ptr,
    sampled_ptr,  # [num_reqs]
    draft_tokens_ptr,
    draft_tokens_stride,
    num_reqs,
    max_model_len,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    in_batch = row < num_reqs
    req_state_idx = tl.load(idx_mapping_ptr + row, mask=in_batch, other=-1)
    drafts = req_state_idx >= 0
    # Sampling leaves rows that it skips undefined; an id must stay in the vocabulary.
    token = tl.load(sampled_ptr + row, mask=drafts, other=0)
    tl.store(draft_tokens_ptr + row * draft_tokens_stride, token, mask=in_batch)
    tl.store(input_ids_ptr + row, token, mask=in_batch)
    position = tl.load(positions_ptr + row, mask=drafts, other=0) + 1
    goes_on = drafts & (position < max_model_len)
    tl.store(idx_mapping_ptr + row, tl.where(goes_on, req_state_idx, -1), mask=in_batch)
    tl.store(positions_ptr + row, position, mask=goes_on)
    tl.store(seq_lens_ptr + row, position + 1, mask=goes_on)
