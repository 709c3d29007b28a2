# SPDX-License-Identifier: Apache-2.0
"""Drawing a token from each row of logits (``vllm.v1.worker.gpu.sample``).

Shapes: T sampled tokens, S request slots, V the vocabulary, B its blocks.
"""

from __future__ import annotations

import torch

from vllm_layerskip.cpu.kernels.randomness import gumbel_noise

_DRAFT_NOISE_SALT = 1 << 30  # As in vllm/v1/worker/gpu/sample/gumbel.py.


def apply_temperature(
    logits_ptr: torch.Tensor,  # [T, V], written
    expanded_idx_mapping_ptr: torch.Tensor,  # [T]
    temperature_ptr: torch.Tensor,  # [S]
) -> None:
    """Divide the rows of requests whose temperature is neither 0 nor 1."""
    temperature = temperature_ptr[expanded_idx_mapping_ptr.long()].float()
    scaled = ((temperature != 0) & (temperature != 1)).nonzero().view(-1)
    if len(scaled):
        logits_ptr[scaled] = (logits_ptr[scaled].float() / temperature[scaled, None]).to(
            logits_ptr.dtype
        )


def gumbel_sample(
    local_argmax_ptr: torch.Tensor,  # [T, B], written
    local_max_ptr: torch.Tensor,  # [T, B], written
    logits_cache_ptr: torch.Tensor | None,  # [S, num_cols, >= V], written
    logits_cache_col_ptr: torch.Tensor | None,  # scalar or [T]
    logits_cache_source_ptr: torch.Tensor | None,  # [T, V]
    logits_ptr: torch.Tensor,  # [T, V]
    expanded_idx_mapping_ptr: torch.Tensor,  # [T]; -1 is greedy and is not cached
    seeds_ptr: torch.Tensor,  # [S]
    pos_ptr: torch.Tensor,  # [T]
    temp_ptr: torch.Tensor,  # [S]
    vocab_size: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
) -> None:
    """Gumbel-max sampling of whole rows."""
    valid = expanded_idx_mapping_ptr >= 0
    requests = expanded_idx_mapping_ptr.clamp(min=0).long()
    temperature = temp_ptr[requests].float() * valid
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None
        assert logits_cache_source_ptr is not None
        columns = logits_cache_col_ptr.expand(len(requests))
        logits_cache_ptr[requests[valid], columns[valid], :vocab_size] = logits_cache_source_ptr[
            valid
        ]
    logits = logits_ptr.float()
    if APPLY_TEMPERATURE:
        logits = logits / temperature.masked_fill(temperature == 0, 1.0)[:, None]
    position = pos_ptr.long() + (_DRAFT_NOISE_SALT if IS_DRAFTING else 0)
    noised = add_gumbel_noise(logits, seeds_ptr[requests], position, temperature != 0, USE_FP64)
    report_winners(noised, local_max_ptr, local_argmax_ptr)


def top_k_top_p(
    LOGITS: torch.Tensor,  # [T, V], written
    K: torch.Tensor | None,  # [T]
    P: torch.Tensor | None,  # [T]
    TOPK_ENABLED: bool,
    TOPP_ENABLED: bool,
) -> None:
    """Mask what is outside of each row's top k and top p, by vLLM's own torch implementation."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    masked = apply_top_k_top_p_pytorch(
        LOGITS,
        K.clone() if TOPK_ENABLED and K is not None else None,
        P if TOPP_ENABLED else None,
        allow_cpu_sync=True,
    )
    if masked is not LOGITS:
        LOGITS.copy_(masked)


def add_gumbel_noise(
    logits: torch.Tensor,  # [T, V] float32
    seed: torch.Tensor,  # [T]
    position: torch.Tensor,  # [T]
    random: torch.Tensor,  # [T] bool; the other rows stay as they are
    use_fp64: bool,
) -> torch.Tensor:
    if use_fp64:
        logits = logits.double()
    if bool(random.any()):
        noise = gumbel_noise(seed[random], position[random], logits.shape[1], use_fp64)
        logits = logits.index_put((random,), logits[random] + noise)
    return logits


def report_winners(
    logits: torch.Tensor,  # [T, V]
    local_max: torch.Tensor,  # [T, B], written
    local_argmax: torch.Tensor,  # [T, B], written
) -> None:
    """Report a row's largest logit as that of its first block."""
    winner, token_ids = logits.max(dim=-1)
    local_max.fill_(-float("inf"))
    local_max[:, 0] = winner
    local_argmax[:, 0] = token_ids
