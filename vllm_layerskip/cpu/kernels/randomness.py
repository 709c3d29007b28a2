# SPDX-License-Identifier: Apache-2.0
"""The random bits of vLLM's and Triton's kernels, bit for bit: seeds keep their meaning."""

from __future__ import annotations

import numpy as np
import torch

_UINT32 = 0xFFFFFFFF


def gumbel_noise(
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


def philox_uniform(
    seed: torch.Tensor,  # [...]
    offset: torch.Tensor,  # [...]
) -> torch.Tensor:
    """float32 in [0, 1) from seed and offset, as ``triton.language.rand`` draws it.

    Philox4x32-10 (Salmon et al., 2011) with the offset as counter and the seed as key.
    """
    key = seed.long().numpy().view(np.uint64)
    counter = offset.long().numpy().view(np.uint64)
    low, high, zero = np.uint64(_UINT32), np.uint64(32), np.uint64(0)
    c0, c1, c2, c3 = counter & low, counter >> high, counter * zero, counter * zero
    k0, k1 = key & low, key >> high
    for _ in range(10):
        from_c0, from_c2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (from_c2 >> high) ^ c1 ^ k0, from_c2 & low
        c2, c3 = (from_c0 >> high) ^ c3 ^ k1, from_c0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    bits = torch.from_numpy(c0.astype(np.uint32).view(np.int32))
    return torch.where(bits < 0, ~bits, bits) * 4.6566127342e-10
