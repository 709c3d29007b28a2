# SPDX-License-Identifier: Apache-2.0
"""Accepting drafts (``vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils``).

Where a kernel reduces the vocabulary by blocks, these functions report a row's result as
that of its first block and leave the other blocks neutral.

Shapes: R rows (requests) of a batch, N logits (those of a row are adjacent: one for each draft
and one for the bonus token), S request slots, K drafts, V the vocabulary, B its blocks.
"""

from __future__ import annotations

import torch

from vllm_layerskip.cpu.kernels.randomness import philox_uniform
from vllm_layerskip.cpu.kernels.sampling import add_gumbel_noise, report_winners

_SMALLEST_UNIFORM = 4.6566127342e-10  # _TL_RAND_MIN of vllm/v1/worker/gpu/sample/gumbel.py.


def gather_draft_sampled(
    draft_sampled_ptr: torch.Tensor,  # [N], written
    pos_ptr: torch.Tensor,  # [N], written
    input_ids_ptr: torch.Tensor,  # [>= T]
    positions_ptr: torch.Tensor,  # [>= T]
    logits_indices_ptr: torch.Tensor,  # [N]
    expanded_idx_mapping_ptr: torch.Tensor,  # [N]
    expanded_local_pos_ptr: torch.Tensor,  # [N]
    prefill_len_ptr: torch.Tensor,  # [S]
) -> None:
    """Each logit's input token and position; -1 for a draft slot within the prefill."""
    indices = logits_indices_ptr.long()
    positions = positions_ptr[indices]
    offsets = expanded_local_pos_ptr
    first_positions = positions - offsets
    prefill_lens = prefill_len_ptr[expanded_idx_mapping_ptr.long()]
    is_placeholder = (offsets > 0) & (first_positions < prefill_lens)
    draft_sampled_ptr.copy_(input_ids_ptr[indices].masked_fill(is_placeholder, -1))
    pos_ptr.copy_(positions)


def logits_stats(
    target_local_argmax_ptr: torch.Tensor,  # [N, B], written
    target_local_max_ptr: torch.Tensor,  # [N, B], written
    target_local_sumexp_ptr: torch.Tensor,  # [N, B], written
    draft_local_max_ptr: torch.Tensor,  # [N, B], written
    draft_local_sumexp_ptr: torch.Tensor,  # [N, B], written
    target_logits_ptr: torch.Tensor,  # [N, >= V]
    draft_logits_ptr: torch.Tensor | None,  # [S, K, >= V], before temperature
    expanded_idx_mapping_ptr: torch.Tensor,  # [N]
    expanded_local_pos_ptr: torch.Tensor,  # [N]
    temp_ptr: torch.Tensor,  # [S]
    vocab_size: int,
    num_speculative_steps: int,
    HAS_DRAFT_LOGITS: bool,
) -> None:
    """Largest logit and summed exponentials of each draft's row."""
    target = target_logits_ptr[:, :vocab_size].float()
    report_winners(target, target_local_max_ptr, target_local_argmax_ptr)
    requests = expanded_idx_mapping_ptr.long()
    temperature = temp_ptr[requests].float()
    # Bonus tokens and greedy requests need no normaliser.
    random = (temperature != 0) & (expanded_local_pos_ptr < num_speculative_steps)
    rows = random.nonzero().view(-1)
    if not len(rows):
        return
    _report_sumexp(target[rows], rows, target_local_max_ptr, target_local_sumexp_ptr)
    if HAS_DRAFT_LOGITS:
        assert draft_logits_ptr is not None
        draft = draft_logits_ptr[requests[rows], expanded_local_pos_ptr[rows].long()]
        draft = draft[:, :vocab_size].float() / temperature[rows, None]
        _report_sumexp(draft, rows, draft_local_max_ptr, draft_local_sumexp_ptr)


def reject(
    sampled_ptr: torch.Tensor,  # [R, K + 1], written
    rejected_steps_ptr: torch.Tensor,  # [R], written
    target_rejected_logsumexp_ptr: torch.Tensor,  # [R], written
    draft_rejected_logsumexp_ptr: torch.Tensor,  # [R], written
    target_logits_ptr: torch.Tensor,  # [N, >= V]
    target_local_argmax_ptr: torch.Tensor,  # [N, B]
    target_local_max_ptr: torch.Tensor,  # [N, B]
    target_local_sumexp_ptr: torch.Tensor,  # [N, B]
    draft_sampled_ptr: torch.Tensor,  # [N]; -1 is never accepted
    draft_logits_ptr: torch.Tensor | None,  # [S, K, >= V]
    draft_local_max_ptr: torch.Tensor,  # [N, B]
    draft_local_sumexp_ptr: torch.Tensor,  # [N, B]
    cu_num_logits_ptr: torch.Tensor,  # [R + 1]
    idx_mapping_ptr: torch.Tensor,  # [R]
    temp_ptr: torch.Tensor,  # [S]
    seed_ptr: torch.Tensor,  # [S]
    pos_ptr: torch.Tensor,  # [N]
    synthetic_conditional_rates_ptr: torch.Tensor | None,  # [K]
    cumulative_log_p_ptr: torch.Tensor | None,  # [N]
    local_residual_mass_ptr: torch.Tensor | None,  # [N, B]
    HAS_DRAFT_LOGITS: bool,
    SYNTHETIC_MODE: bool,
    USE_BLOCK_VERIFICATION: bool,
) -> None:
    """How many drafts of each row are accepted, and the tokens up to there."""
    steps = torch.arange(sampled_ptr.shape[1] - 1)
    rows, drafts, valid = _drafts_of_rows(cu_num_logits_ptr, draft_sampled_ptr, steps)
    requests = idx_mapping_ptr.long()
    temperature = temp_ptr[requests].float()[:, None]
    is_greedy = temperature == 0
    seed = seed_ptr[requests][:, None].expand(rows.shape)
    uniform = philox_uniform(seed, pos_ptr[rows]).clamp(min=_SMALLEST_UNIFORM)
    argmax = target_local_argmax_ptr.gather(1, target_local_max_ptr.argmax(1, keepdim=True))
    argmax = argmax.view(-1)[rows]
    target_lse = _logsumexp(target_local_max_ptr, target_local_sumexp_ptr)[rows]
    target_log_p = target_logits_ptr[rows, drafts].float() - target_lse
    draft_log_p = draft_lse = torch.zeros_like(target_lse)
    if HAS_DRAFT_LOGITS:
        assert draft_logits_ptr is not None
        draft_lse = _logsumexp(draft_local_max_ptr, draft_local_sumexp_ptr)[rows]
        draft_logits = draft_logits_ptr[requests[:, None], steps, drafts].float()
        draft_log_p = draft_logits / temperature - draft_lse

    if SYNTHETIC_MODE:
        assert synthetic_conditional_rates_ptr is not None
        accepted = uniform < synthetic_conditional_rates_ptr[: len(steps)]
    else:
        accepted = torch.where(
            is_greedy, argmax == drafts, target_log_p > uniform.log() + draft_log_p
        )
    num_accepted = _leading(accepted & valid)
    if USE_BLOCK_VERIFICATION and len(steps):
        assert cumulative_log_p_ptr is not None
        ratio = cumulative_log_p_ptr[rows].exp()
        mass = _residual_mass(local_residual_mass_ptr, rows, ratio, target_log_p)
        longest = _longest_block(uniform, ratio, mass, valid)
        num_accepted = torch.where(is_greedy[:, 0], num_accepted, longest)

    rejected = num_accepted.clamp(max=max(len(steps) - 1, 0))[:, None]
    is_accepted = steps < num_accepted[:, None]
    sampled_ptr[:, :-1] = torch.where(is_greedy & ~is_accepted, argmax, drafts)
    rejected_steps_ptr.copy_(num_accepted)
    # Not used for greedy rows, which keep the argmax.
    target_rejected_logsumexp_ptr.copy_(target_lse.gather(1, rejected).view(-1))
    draft_rejected_logsumexp_ptr.copy_(draft_lse.gather(1, rejected).view(-1))


def _drafts_of_rows(
    cu_num_logits: torch.Tensor,  # [R + 1]
    draft_sampled: torch.Tensor,  # [N]; -1 is never accepted
    steps: torch.Tensor,  # [K]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[R, K]`` each: the logits' row, the draft, and whether it may be accepted.

    A draft that does not exist points at any row and any token.
    """
    starts = cu_num_logits[:-1].long()
    exists = steps < (cu_num_logits.diff() - 1)[:, None]
    rows = torch.where(exists, starts[:, None] + steps, starts[:, None])
    drafts = draft_sampled[(rows + 1).clamp(max=len(draft_sampled) - 1)].long()
    return rows, drafts.clamp(min=0), exists & (drafts >= 0)


def _residual_mass(
    local_residual_mass: torch.Tensor | None,  # [N, B]
    rows: torch.Tensor,  # [R, K]
    ratio: torch.Tensor,  # [R, K]
    target_log_p: torch.Tensor,  # [R, K]
) -> torch.Tensor:
    """``[R, K]``: the sum of the residual distribution after each draft."""
    if local_residual_mass is not None:
        next_rows = (rows + 1).clamp(max=len(local_residual_mass) - 1)
        return local_residual_mass.sum(1)[next_rows]
    mass = torch.zeros_like(ratio)
    mass[:, :-1] = ratio[:, :-1] * (1 - target_log_p[:, 1:].exp())
    return mass


def _longest_block(
    uniform: torch.Tensor, ratio: torch.Tensor, mass: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """``[R]``: the longest run of drafts that block verification accepts, from ``[R, K]`` each."""
    steps = torch.arange(ratio.shape[1])
    next_valid = torch.zeros_like(valid)
    next_valid[:, :-1] = valid[:, 1:]
    room = mass + 1 - ratio
    threshold = torch.where(room > 0, mass / room, 1.0)
    threshold = torch.where(next_valid, threshold, ratio)
    block_ends = (uniform <= threshold) & (steps < _leading(valid)[:, None])
    return (block_ends * (steps + 1)).amax(1)


def resample(
    resampled_local_argmax_ptr: torch.Tensor,  # [R, B], written
    resampled_local_max_ptr: torch.Tensor,  # [R, B], written
    target_logits_ptr: torch.Tensor,  # [N, >= V]
    target_rejected_logsumexp_ptr: torch.Tensor,  # [R]
    draft_logits_ptr: torch.Tensor | None,  # [S, K, >= V], before temperature
    draft_rejected_logsumexp_ptr: torch.Tensor,  # [R]
    rejected_step_ptr: torch.Tensor,  # [R]
    cu_num_logits_ptr: torch.Tensor,  # [R + 1]
    expanded_idx_mapping_ptr: torch.Tensor,  # [N]
    draft_sampled_ptr: torch.Tensor,  # [N]
    temp_ptr: torch.Tensor,  # [S]
    seed_ptr: torch.Tensor,  # [S]
    pos_ptr: torch.Tensor,  # [N]
    cumulative_log_p_ptr: torch.Tensor | None,  # [N]
    vocab_size: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    WATERMARK: bool,
) -> None:
    """Draw each row's bonus token, or the token that replaces its first rejected draft."""
    if WATERMARK:
        raise NotImplementedError(
            "Watermarking with speculative decoding does not run in Triton's interpreter. "
            "Leave watermark_config out on a CPU."
        )
    step = rejected_step_ptr.long()
    rows = cu_num_logits_ptr[:-1].long() + step
    is_bonus = rows == cu_num_logits_ptr[1:] - 1
    requests = expanded_idx_mapping_ptr[rows].clamp(min=0).long()
    temperature = temp_ptr[requests].float()
    rejected_token = draft_sampled_ptr[(rows + 1).clamp(max=len(draft_sampled_ptr) - 1)].long()
    target = target_logits_ptr[rows, :vocab_size].float()
    if HAS_DRAFT_LOGITS:
        assert draft_logits_ptr is not None
        step_of_draft = step.clamp(max=draft_logits_ptr.shape[1] - 1)
        draft = draft_logits_ptr[requests, step_of_draft, :vocab_size].float()
        draft = draft / temperature.masked_fill(temperature == 0, 1.0)[:, None]
        log_p = target - target_rejected_logsumexp_ptr[:, None]
        if USE_BLOCK_VERIFICATION:
            assert cumulative_log_p_ptr is not None
            log_p += (cumulative_log_p_ptr[(rows - 1).clamp(min=0)] * (step > 0))[:, None]
        log_q = draft - draft_rejected_logsumexp_ptr[:, None]
        # log(max(p - q, 0)), the residual distribution.
        ratio = (log_q - log_p).exp()
        residual = torch.where(ratio < 1.0, log_p + torch.log1p(-ratio), -float("inf"))
    else:
        residual = target.scatter(1, rejected_token.clamp(min=0)[:, None], -float("inf"))
    from_target = is_bonus | (rejected_token < 0)
    logits = torch.where(from_target[:, None], target, residual)
    noised = add_gumbel_noise(
        logits, seed_ptr[requests], pos_ptr[rows].long(), temperature != 0, USE_FP64
    )
    report_winners(noised, resampled_local_max_ptr, resampled_local_argmax_ptr)


def insert_resampled(
    sampled_ptr: torch.Tensor,  # [R, K + 1], written
    num_sampled_ptr: torch.Tensor,  # [R], number of accepted drafts; written
    resampled_local_argmax_ptr: torch.Tensor,  # [R, B]
    resampled_local_max_ptr: torch.Tensor,  # [R, B]
    cu_num_logits_ptr: torch.Tensor,  # [R + 1]
    expanded_idx_mapping_ptr: torch.Tensor,  # [N]
    temp_ptr: torch.Tensor,  # [S]
) -> None:
    num_accepted = num_sampled_ptr.long()
    rows = cu_num_logits_ptr[:-1] + num_accepted
    is_bonus = rows == cu_num_logits_ptr[1:] - 1
    temperature = temp_ptr[expanded_idx_mapping_ptr[rows].long()]
    # A greedy row has its argmax there already.
    inserts = ((temperature != 0) | is_bonus).nonzero().view(-1)
    largest = resampled_local_max_ptr.masked_fill(resampled_local_max_ptr.isnan(), -float("inf"))
    winners = resampled_local_argmax_ptr.gather(1, largest.argmax(1, keepdim=True)).view(-1)
    sampled_ptr[inserts, num_accepted[inserts]] = winners[inserts]
    num_sampled_ptr += 1


def _report_sumexp(
    logits: torch.Tensor,  # [n, V]
    rows: torch.Tensor,  # [n] rows of the reports
    local_max: torch.Tensor,  # [N, B], written
    local_sumexp: torch.Tensor,  # [N, B], written
) -> None:
    largest = logits.amax(dim=-1)
    local_max[rows] = -float("inf")
    local_max[rows, 0] = largest
    local_sumexp[rows] = 0.0
    local_sumexp[rows, 0] = (logits - largest[:, None]).exp().sum(-1)


def _logsumexp(local_max: torch.Tensor, local_sumexp: torch.Tensor) -> torch.Tensor:
    """``[N]`` from ``[N, B]`` each."""
    largest = local_max.amax(dim=1, keepdim=True)
    return (largest + (local_sumexp * (local_max - largest).exp()).sum(1, keepdim=True).log())[:, 0]


def _leading(accepted: torch.Tensor) -> torch.Tensor:
    """``[R]`` length of each row's leading run of True in ``[R, K]``."""
    return accepted.long().cumprod(1).sum(1)
