# SPDX-License-Identifier: Apache-2.0
"""torch functions in place of the Triton kernels that hurt most in the interpreter.

On a CPU Model Runner V2's Triton kernels run in Triton's interpreter: row by row and block
by block in Python. Three of them are replaced through vLLM's own ``register_kernels``:

* ``_gumbel_sample_kernel`` runs for every sampled token over the whole vocabulary. The
  replacement draws the same random bits (vLLM's Murmur3 hash of seed, position and token),
  so seeds keep their meaning;
* ``_resample_kernel`` runs over the whole vocabulary for every verified request, and with
  probabilistic drafts does not run in the interpreter at all (it needs libdevice's log1p);
* ``_topk_topp_kernel`` does not run in the interpreter at all (it calls ``.to`` on a loop
  index, which is a plain int there). The replacement is vLLM's own torch implementation.

Only for a CPU in interpret mode; ``tests/unit/test_cpu_kernels.py`` holds each against the
kernel that it replaces.
"""

from __future__ import annotations

import inspect
import warnings

import torch

GUMBEL_SAMPLE = "vllm.v1.worker.gpu.sample.gumbel._gumbel_sample_kernel"
RESAMPLE = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils._resample_kernel"
TOPK_TOPP = "vllm.v1.sample.ops.topk_topp_triton._topk_topp_kernel"

_UINT32 = 0xFFFFFFFF
_DRAFT_NOISE_SALT = 1 << 30  # As in vllm/v1/worker/gpu/sample/gumbel.py.


def register() -> None:
    """Have vLLM launch these functions instead of the kernels, in this process."""
    from vllm.triton_utils import dispatcher

    wanted = {GUMBEL_SAMPLE: gumbel_sample, RESAMPLE: resample, TOPK_TOPP: topk_topp}
    missing = {name: kernel for name, kernel in wanted.items() if name not in dispatcher._registry}
    if missing:
        with warnings.catch_warnings():
            # It looks at every attribute of every module, deprecated ones too.
            warnings.simplefilter("ignore", FutureWarning)
            dispatcher.register_kernels(missing)


def gumbel_sample(
    local_argmax_ptr: torch.Tensor,  # [num_tokens, num_blocks]
    local_argmax_stride: int,
    local_max_ptr: torch.Tensor,  # [num_tokens, num_blocks]
    local_max_stride: int,
    logits_cache_ptr: torch.Tensor | None,  # [max_num_reqs, num_cols, vocab_size]
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: torch.Tensor | None,  # scalar or [num_tokens]
    logits_cache_source_ptr: torch.Tensor | None,  # [num_tokens, vocab_size]
    logits_cache_source_stride: int,
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens]
    seeds_ptr: torch.Tensor,  # [max_num_reqs]
    pos_ptr: torch.Tensor,  # [num_tokens]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """Gumbel-max sampling of whole rows; a row's winner is reported as its first block's."""
    valid = expanded_idx_mapping_ptr >= 0
    requests = expanded_idx_mapping_ptr.clamp(min=0)
    temperature = temp_ptr[requests].float() * valid
    logits = logits_ptr.float()
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None
        assert logits_cache_source_ptr is not None
        columns = logits_cache_col_ptr.expand(len(requests))
        logits_cache_ptr[requests[valid], columns[valid], :vocab_size] = logits_cache_source_ptr[
            valid
        ]
    if APPLY_TEMPERATURE:
        logits = logits / temperature.masked_fill(temperature == 0, 1.0)[:, None]
    position = pos_ptr.long() + (_DRAFT_NOISE_SALT if IS_DRAFTING else 0)
    noised = _add_gumbel_noise(logits, seeds_ptr[requests], position, temperature != 0, USE_FP64)
    _report_winners(noised, local_max_ptr, local_argmax_ptr)


def resample(
    resampled_local_argmax_ptr: torch.Tensor,  # [num_reqs, num_blocks]
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,  # [num_reqs, num_blocks]
    resampled_local_max_stride: int,
    target_logits_ptr: torch.Tensor,  # [num_logits, V]
    target_logits_stride: int,
    target_rejected_logsumexp_ptr: torch.Tensor,  # [num_reqs]
    draft_logits_ptr: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, V]
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_rejected_logsumexp_ptr: torch.Tensor,  # [num_reqs]
    rejected_step_ptr: torch.Tensor,  # [num_reqs]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    draft_sampled_ptr: torch.Tensor,  # [num_logits]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    seed_ptr: torch.Tensor,  # [max_num_reqs]
    pos_ptr: torch.Tensor,  # [num_logits]
    cumulative_log_p_ptr: torch.Tensor | None,  # [num_logits]
    contexts_ptr: torch.Tensor | None,
    contexts_stride: int,
    watermarking_ptr: torch.Tensor | None,
    watermarking_skip_mask_ptr: torch.Tensor | None,
    watermark_key_0: int,
    watermark_key_1: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    CONTEXT_WIDTH: int,
    WATERMARK: bool,
    DEDUPLICATE_CONTEXTS: bool,
) -> None:
    """Draw each request's bonus token, or the token that replaces its first rejected draft."""
    if WATERMARK:
        raise NotImplementedError(
            "Watermarking with speculative decoding does not run in Triton's interpreter. "
            "Leave watermark_config out on a CPU."
        )
    step = rejected_step_ptr.long()
    rows = cu_num_logits_ptr[:-1].long() + step
    is_bonus = rows == cu_num_logits_ptr[1:] - 1
    requests = expanded_idx_mapping_ptr[rows].clamp(min=0)
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
    noised = _add_gumbel_noise(
        logits, seed_ptr[requests], pos_ptr[rows].long(), temperature != 0, USE_FP64
    )
    _report_winners(noised, resampled_local_max_ptr, resampled_local_argmax_ptr)


def topk_topp(
    LOGITS: torch.Tensor,  # [batch_size, vocab_size]
    LOGITS_STRIDE_0: int,
    BUFFER: torch.Tensor,
    PERCENTILE_TO_STD_TABLE: torch.Tensor,
    NORMAL_CDF_TO_SIGMA_TABLE: torch.Tensor,
    K: torch.Tensor | None,  # [batch_size]
    P: torch.Tensor | None,  # [batch_size]
    BATCH_SIZE: int,
    VOCAB_SIZE: int,
    MASK_VALUE: float,
    BLOCK_SIZE: int,
    BLOCK_SIZE_TRUNC: int,
    TOPK_ENABLED: bool,
    TOPP_ENABLED: bool,
    SPLIT_COVERS_PONLY: bool,
    **launch_options: int,
) -> None:
    """Mask ``LOGITS`` in place outside of each row's top k and top p."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    masked = apply_top_k_top_p_pytorch(
        LOGITS,
        K.clone() if TOPK_ENABLED and K is not None else None,
        P if TOPP_ENABLED else None,
        allow_cpu_sync=True,
    )
    if masked is not LOGITS:
        LOGITS.copy_(masked)


# vLLM forwards a launch by name only to a function whose parameters are the kernel's own,
# and passes the launch's options (num_warps) along.
_parameters = inspect.signature(topk_topp).parameters.values()
topk_topp.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [parameter for parameter in _parameters if parameter.kind is not parameter.VAR_KEYWORD]
)


def _add_gumbel_noise(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    seed: torch.Tensor,  # [num_tokens]
    position: torch.Tensor,  # [num_tokens]
    random: torch.Tensor,  # [num_tokens] bool; the others stay as they are
    use_fp64: bool,
) -> torch.Tensor:
    if use_fp64:
        logits = logits.double()
    if bool(random.any()):
        noise = _gumbel_noise(seed[random], position[random], logits.shape[1], use_fp64)
        logits = logits.index_put((random,), logits[random] + noise)
    return logits


def _report_winners(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    local_max: torch.Tensor,  # [num_tokens, num_blocks]
    local_argmax: torch.Tensor,  # [num_tokens, num_blocks]
) -> None:
    winner, token_ids = logits.max(dim=-1)
    local_max.fill_(-float("inf"))
    local_max[:, 0] = winner
    local_argmax[:, 0] = token_ids


def _gumbel_noise(
    seed: torch.Tensor,  # [num_tokens]
    position: torch.Tensor,  # [num_tokens]
    vocab_size: int,
    use_fp64: bool,
) -> torch.Tensor:
    """``[num_tokens, vocab_size]`` Gumbel noise, bit for bit vLLM's."""
    bits = _murmur3_hash32(seed, position, vocab_size, 0)
    if use_fp64:
        high = _murmur3_hash32(seed, position, vocab_size, 0x9E3779B9)
        # 53 random bits; shifted apart so that they fit int64.
        random53 = (high << 21) | (bits >> 11)
        uniform = (random53.double() + 0.5) * 2.0**-53
        uniform = torch.where(uniform == 1.0, uniform - 2.0**-53, uniform)
        return -torch.log(-torch.log(uniform))
    high, low = (bits >> 16).float(), (bits & 0xFFFF).float()
    uniform = high * 2.0**-16 + (low + 0.5) * 2.0**-32
    return -torch.log(-_log1p_neg(uniform))


def _log1p_neg(value: torch.Tensor) -> torch.Tensor:
    """log(1 - value): a series where the winners are drawn, the logarithm elsewhere."""
    series = torch.full_like(value, 1.0 / 8.0)
    for degree in range(7, 0, -1):
        series = 1.0 / degree + value * series
    direct = torch.log((1.0 - value).clamp(min=2.0**-24))
    return torch.where(value < 0.25, -value * series, direct)


def _murmur3_hash32(
    seed: torch.Tensor,  # [num_tokens]
    position: torch.Tensor,  # [num_tokens]
    vocab_size: int,
    domain: int,
) -> torch.Tensor:
    """``[num_tokens, vocab_size]`` uint32 hashes as int64, keyed by token id."""
    token_ids = torch.arange(vocab_size, device=seed.device)
    seed = seed.long()
    state = torch.full_like(seed, domain)
    for key in (seed & _UINT32, (seed >> 32) & _UINT32, position & _UINT32):
        state = _mix(state, key)
    state = _mix(state[:, None], token_ids[None, :]) ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _UINT32
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _UINT32
    return state ^ (state >> 16)


def _mix(state: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    # Products of two uint32 may wrap in int64; their low 32 bits are right all the same.
    key = _rotate_left((key * 0xCC9E2D51) & _UINT32, 15)
    state = state ^ ((key * 0x1B873593) & _UINT32)
    return (_rotate_left(state, 13) * 5 + 0xE6546B64) & _UINT32


def _rotate_left(value: torch.Tensor, shift: int) -> torch.Tensor:
    return ((value << shift) | (value >> (32 - shift))) & _UINT32
