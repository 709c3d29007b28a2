# SPDX-License-Identifier: Apache-2.0
"""A batch's positions, slots, token ids and counts (``vllm.v1.worker.gpu.input_batch``).

Shapes: R rows (requests) of a batch, T tokens, N logits, S request slots, K drafts, G groups
of the KV cache, M the longest model length, V the vocabulary, H the hidden size.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch


def compute_slot_mappings(
    idx_mapping: torch.Tensor,  # [R]; -1 owns no slots
    query_start_loc: torch.Tensor,  # [R + 1]
    pos: torch.Tensor,  # [T]
    block_table_ptrs: torch.Tensor,  # [G] addresses of [S, stride] int32
    block_table_strides: torch.Tensor,  # [G]
    block_sizes: torch.Tensor,  # [G]
    slot_mapping_enabled: torch.Tensor,  # [G] bool
    slot_mappings_ptr: torch.Tensor,  # [G, max_num_tokens], written
    CP_SIZE: int,
    PAD_ID: int,
) -> None:
    if CP_SIZE != 1:
        raise NotImplementedError(
            f"decode_context_parallel_size={CP_SIZE} does not run on a CPU; set it to 1."
        )
    rows, _ = _ragged(query_start_loc[: len(idx_mapping) + 1].diff())
    requests = idx_mapping[rows]
    is_real = requests >= 0
    requests = requests.clamp(min=0).long()
    # A row that owns no slots may be at any position.
    positions = pos[: len(rows)].long() * is_real
    slot_mappings_ptr[:, len(rows) :] = PAD_ID
    num_slots = int(requests.max()) + 1 if len(requests) else 0
    for group, block_size in enumerate(block_sizes.tolist()):
        slots = slot_mappings_ptr[group, : len(rows)]
        if not slot_mapping_enabled[group] or not num_slots:
            slots.fill_(PAD_ID)
            continue
        block_table = _int32_at(
            int(block_table_ptrs[group]), num_slots, int(block_table_strides[group])
        )
        blocks = block_table[requests, positions // block_size].long()
        slots[:] = torch.where(is_real, blocks * block_size + positions % block_size, PAD_ID)


def prepare_pos_seq_lens(
    pos_ptr: torch.Tensor,  # [>= T], written
    seq_lens_ptr: torch.Tensor,  # [S], written; 0 after the batch
    idx_mapping_ptr: torch.Tensor,  # [R]
    query_start_loc_ptr: torch.Tensor,  # [R + 1]
    num_computed_tokens_ptr: torch.Tensor,  # [S]
) -> None:
    num_reqs = len(idx_mapping_ptr)
    query_lens = query_start_loc_ptr[: num_reqs + 1].diff()
    num_computed = num_computed_tokens_ptr[idx_mapping_ptr.long()]
    seq_lens_ptr[:num_reqs] = num_computed + query_lens
    seq_lens_ptr[num_reqs:] = 0
    rows, offsets = _ragged(query_lens)
    pos_ptr[: len(rows)] = num_computed[rows] + offsets


def combine_sampled_and_draft_tokens(
    input_ids_ptr: torch.Tensor,  # [>= T], written
    idx_mapping_ptr: torch.Tensor,  # [R]
    last_sampled_tokens_ptr: torch.Tensor,  # [S, 1]
    query_start_loc_ptr: torch.Tensor,  # [R + 1]
    seq_lens_ptr: torch.Tensor,  # [>= R]
    prefill_len_ptr: torch.Tensor,  # [S]
    draft_tokens_ptr: torch.Tensor,  # [S, K]
    cu_num_logits_ptr: torch.Tensor,  # [R + 1]
    logits_indices_ptr: torch.Tensor,  # [N], written
    NUM_NEW_SAMPLED_TOKENS: int,
) -> None:
    """Put each row's last sampled token and drafts in front of its logits."""
    num_reqs = len(idx_mapping_ptr)
    requests = idx_mapping_ptr.long()
    num_logits = cu_num_logits_ptr[: num_reqs + 1].diff()
    first_logits = query_start_loc_ptr[1 : num_reqs + 1] - num_logits
    rows, offsets = _ragged(num_logits)
    indices = (first_logits[rows] + offsets).long()
    logits_indices_ptr[: len(indices)] = indices

    seq_lens, prefill_lens = seq_lens_ptr[:num_reqs], prefill_len_ptr[requests]
    if NUM_NEW_SAMPLED_TOKENS > 0:
        # The tokens of a prompt's tail are known already.
        generated = (seq_lens > prefill_lens) & (seq_lens - num_logits >= prefill_lens)
        sampled = last_sampled_tokens_ptr.view(-1)[requests[generated]]
        input_ids_ptr[first_logits[generated].long()] = sampled.to(input_ids_ptr.dtype)
    drafted = (seq_lens > prefill_lens)[rows] & (offsets >= NUM_NEW_SAMPLED_TOKENS)
    drafts = draft_tokens_ptr[requests[rows[drafted]], offsets[drafted] - NUM_NEW_SAMPLED_TOKENS]
    input_ids_ptr[indices[drafted]] = drafts.to(input_ids_ptr.dtype)


def expand_idx_mapping(
    idx_mapping_ptr: torch.Tensor,  # [R]
    expanded_idx_mapping_ptr: torch.Tensor,  # [N], written
    expanded_local_pos_ptr: torch.Tensor,  # [N], written
    cu_num_logits_ptr: torch.Tensor,  # [R + 1]
) -> None:
    rows, offsets = _ragged(cu_num_logits_ptr[: len(idx_mapping_ptr) + 1].diff())
    expanded_idx_mapping_ptr[: len(rows)] = idx_mapping_ptr[rows]
    expanded_local_pos_ptr[: len(rows)] = offsets


def count_sampled_and_rejected(
    num_sampled_ptr: torch.Tensor,  # [R], written
    num_rejected_ptr: torch.Tensor,  # [R], written
    seq_lens_ptr: torch.Tensor,  # [>= R]
    cu_num_logits_ptr: torch.Tensor,  # [R + 1]
    idx_mapping_ptr: torch.Tensor,  # [R]
    prefill_len_ptr: torch.Tensor,  # [S]
) -> None:
    """A row in the middle of its prefill samples and rejects nothing."""
    num_reqs = len(idx_mapping_ptr)
    mid_prefill = seq_lens_ptr[:num_reqs] < prefill_len_ptr[idx_mapping_ptr.long()]
    num_sampled = num_sampled_ptr[:num_reqs].masked_fill_(mid_prefill, 0)
    num_rejected = cu_num_logits_ptr[: num_reqs + 1].diff() - num_sampled
    num_rejected_ptr[:num_reqs] = num_rejected.masked_fill_(mid_prefill, 0)


def post_update(
    idx_mapping_ptr: torch.Tensor,  # [R]; -1 is skipped
    num_computed_tokens_ptr: torch.Tensor,  # [S], written
    last_sampled_tokens_ptr: torch.Tensor,  # [S, 1], written
    output_bin_counts_ptr: torch.Tensor | None,  # [S, V], written
    sampled_tokens_ptr: torch.Tensor,  # [R, K + 1]
    num_sampled_ptr: torch.Tensor,  # [R]
    num_rejected_ptr: torch.Tensor,  # [R]
    query_start_loc_ptr: torch.Tensor | None,  # [R + 1]
    all_token_ids_ptr: torch.Tensor,  # [S, M], written
    total_len_ptr: torch.Tensor,  # [S], written
) -> None:
    """Append what each row sampled to its request."""
    batch_rows = (idx_mapping_ptr >= 0).nonzero().view(-1)
    requests = idx_mapping_ptr[batch_rows].long()
    num_sampled = num_sampled_ptr[batch_rows]
    rows, offsets = _ragged(num_sampled)
    tokens = sampled_tokens_ptr[batch_rows[rows], offsets]
    owners = requests[rows]
    all_token_ids_ptr[owners, total_len_ptr[owners] + offsets] = tokens.to(all_token_ids_ptr.dtype)
    if output_bin_counts_ptr is not None:
        one = torch.ones((), dtype=output_bin_counts_ptr.dtype)
        output_bin_counts_ptr.index_put_((owners, tokens.long()), one, accumulate=True)

    some = num_sampled > 0
    last = sampled_tokens_ptr[batch_rows[some], num_sampled[some].long() - 1]
    last_sampled_tokens_ptr.view(-1)[requests[some]] = last.to(last_sampled_tokens_ptr.dtype)
    total_len_ptr[requests] += num_sampled
    num_computed_tokens_ptr[requests] -= num_rejected_ptr[batch_rows]
    if query_start_loc_ptr is not None:
        query_lens = query_start_loc_ptr[: len(idx_mapping_ptr) + 1].diff()
        num_computed_tokens_ptr[requests] += query_lens[batch_rows]


def prepare_first_drafts(
    idx_mapping_ptr: torch.Tensor,  # [S], written; -1 drafts nothing
    input_ids_ptr: torch.Tensor,  # [>= S], written
    positions_ptr: torch.Tensor,  # [>= S], written
    seq_lens_ptr: torch.Tensor,  # [>= S], written
    query_start_loc_ptr: torch.Tensor,  # [>= S + 1], written
    target_seq_lens_ptr: torch.Tensor,  # [>= R]
    num_sampled_ptr: torch.Tensor,  # [R]
    num_rejected_ptr: torch.Tensor,  # [R]
    last_sampled_ptr: torch.Tensor,  # [S, 1]
    num_reqs: int,
    max_num_reqs: int,
    max_model_len: int,
) -> None:
    """Inputs of the first draft pass (``vllm_layerskip.worker.draft_inputs``)."""
    requests = idx_mapping_ptr[:num_reqs]
    positions = target_seq_lens_ptr[:num_reqs] - num_rejected_ptr[:num_reqs]
    drafts = (requests >= 0) & (num_sampled_ptr[:num_reqs] > 0) & (positions < max_model_len)
    tokens = last_sampled_ptr.view(-1)[requests.clamp(min=0).long()]
    positions = positions.masked_fill(~drafts, 0)
    for buffer, values in (
        (input_ids_ptr, tokens.masked_fill(~drafts, 0)),
        (positions_ptr, positions),
        (seq_lens_ptr, positions + 1),
    ):
        buffer[:num_reqs] = values
        buffer[num_reqs:max_num_reqs] = 0
    requests.masked_fill_(~drafts, -1)
    idx_mapping_ptr[num_reqs:] = -1
    starts = torch.arange(1, max_num_reqs + 1).clamp_(max=num_reqs)
    query_start_loc_ptr[1 : max_num_reqs + 1] = starts


def advance_drafts(
    idx_mapping_ptr: torch.Tensor,  # [S], the batch's rows written; -1 drafts nothing
    input_ids_ptr: torch.Tensor,  # [>= R], written
    positions_ptr: torch.Tensor,  # [>= R], written
    seq_lens_ptr: torch.Tensor,  # [>= R], written
    sampled_ptr: torch.Tensor,  # [R]; undefined where nothing is drafted
    draft_tokens_ptr: torch.Tensor,  # [S], the batch's rows written
    num_reqs: int,
    max_model_len: int,
) -> None:
    """Make a draft pass's tokens the next one's inputs (``vllm_layerskip.worker.draft_inputs``)."""
    requests, positions = idx_mapping_ptr[:num_reqs], positions_ptr[:num_reqs]
    drafts = requests >= 0
    tokens = sampled_ptr[:num_reqs].masked_fill(~drafts, 0)
    draft_tokens_ptr[:num_reqs] = tokens
    input_ids_ptr[:num_reqs] = tokens
    goes_on = drafts & (positions + 1 < max_model_len)
    positions += goes_on
    seq_lens = seq_lens_ptr[:num_reqs]
    seq_lens.copy_(torch.where(goes_on, positions + 1, seq_lens))
    requests.masked_fill_(~goes_on, -1)


def prepare_verify_plan(
    idx_mapping_out_ptr: torch.Tensor,  # [S], the batch's rows written
    query_start_loc_out_ptr: torch.Tensor,  # [S + 1], the batch's rows written
    slot_mappings_out_ptr: torch.Tensor,  # [G, S], the batch's rows written
    idx_mapping_ptr: torch.Tensor,  # [num_requests]
    slot_mappings_ptr: torch.Tensor,  # [G, T]
    num_requests: int,
    num_queries: int,
    num_reqs: int,
    num_speculative_tokens: int,
) -> None:
    """The early stage's query in a verify step (``vllm_layerskip.worker.model_state``)."""
    idx_mapping_out_ptr[:num_requests] = idx_mapping_ptr[:num_requests]
    idx_mapping_out_ptr[num_requests:num_reqs] = -1
    query_start_loc_out_ptr[: num_reqs + 1] = torch.arange(num_reqs + 1).clamp_(max=num_queries)
    last_drafts = torch.arange(num_reqs) * (num_speculative_tokens + 1) + num_speculative_tokens
    slot_mappings_out_ptr[:, :num_reqs] = slot_mappings_ptr[:, last_drafts]


def store_exit_states(
    hidden_states_out_ptr: torch.Tensor,  # [S, N, H], written: N passes
    residual_out_ptr: torch.Tensor,  # [S, N, H], written
    idx_mapping_ptr: torch.Tensor,  # [R]; -1 stores nothing
    hidden_states_ptr: torch.Tensor,  # [>= R * num_tokens_per_req, H]
    residual_ptr: torch.Tensor,  # [>= R * num_tokens_per_req, H]
    num_tokens_per_req: int,
) -> None:
    """Keep the first N tokens of each row (``vllm_layerskip.worker.exit_states``)."""
    rows = (idx_mapping_ptr >= 0).nonzero().view(-1)
    requests = idx_mapping_ptr[rows].long()
    tokens = rows[:, None] * num_tokens_per_req + torch.arange(hidden_states_out_ptr.shape[1])
    hidden_states_out_ptr[requests] = hidden_states_ptr[tokens]
    residual_out_ptr[requests] = residual_ptr[tokens]


def gather_exit_states(
    hidden_states_out_ptr: torch.Tensor,  # [T, H], written
    residual_out_ptr: torch.Tensor,  # [T, H], written
    hidden_states_ptr: torch.Tensor,  # [S, K, H]
    residual_ptr: torch.Tensor,  # [S, K, H]
    idx_mapping_ptr: torch.Tensor,  # [R]; -1 gives zeros
    last_hidden_states_ptr: torch.Tensor,  # [R, H]
    last_residual_ptr: torch.Tensor,  # [R, H]
    num_speculative_tokens: int,
) -> None:
    """Each row's stored states, then the last one, which is passed in; zeros for padding."""
    num_reqs, hidden_size = len(idx_mapping_ptr), hidden_states_out_ptr.shape[1]
    is_request = (idx_mapping_ptr >= 0)[:, None, None]
    requests = idx_mapping_ptr.clamp(min=0).long()
    for out, stored, last in (
        (hidden_states_out_ptr, hidden_states_ptr, last_hidden_states_ptr),
        (residual_out_ptr, residual_ptr, last_residual_ptr),
    ):
        states = torch.cat(
            [stored[requests, :num_speculative_tokens], last[:num_reqs, None]], dim=1
        )
        states = states.masked_fill(~is_request, 0).view(-1, hidden_size)
        out[: len(states)] = states
        out[len(states) :] = 0


def _ragged(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[sum(lengths)]`` int64 row of each element, and its offset in the row."""
    lengths = lengths.long()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    starts = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows)) - starts[rows]


def _int32_at(address: int, num_rows: int, row_stride: int) -> torch.Tensor:
    """``[num_rows, row_stride]`` int32 at an address, not copied."""
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_int32))
    return torch.from_numpy(np.ctypeslib.as_array(pointer, (num_rows, row_stride)))
