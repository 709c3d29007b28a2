# SPDX-License-Identifier: Apache-2.0
"""The buffer between drafting and verification.

Draft pass k of a request leaves its exit state in ``states[:, slot, k]``; the next verify
step of that request reads them. Why nothing stale is ever read:

* A request's slot belongs to it from ``add_request`` until it is finished or preempted, and
  ``add_request`` invalidates the slot, so a new owner never sees its predecessor's states.
* ``num_valid_np`` counts, per slot, the passes of the *last* propose. It is host data that
  is known when a step is launched; reading it costs no synchronisation.
* Device writes and reads are ordered by the stream: propose of step t runs before verify
  of step t + 1.

Shapes: S request slots, K drafts, H hidden size, R rows of a batch, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.triton_utils import tl, triton


class ExitStates:
    def __init__(
        self,
        max_num_reqs: int,
        num_speculative_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_speculative_tokens = num_speculative_tokens
        # [2, S, K, H]: hidden_states and residual.
        self.states = torch.zeros(
            2, max_num_reqs, num_speculative_tokens, hidden_size, dtype=dtype, device=device
        )
        # [S] draft passes of the last propose.
        self.num_valid_np = np.zeros(max_num_reqs, dtype=np.int32)

    @property
    def num_bytes(self) -> int:
        return self.states.nbytes

    def invalidate(self, req_index: int) -> None:
        self.num_valid_np[req_index] = 0

    def set_num_valid(
        self,
        idx_mapping_np: np.ndarray,  # [R]
        num_valid: np.ndarray | int,  # [R]
    ) -> None:
        self.num_valid_np[idx_mapping_np] = num_valid

    def cover(
        self,
        idx_mapping_np: np.ndarray,  # [R]
        num_drafts: int,
    ) -> bool:
        """Whether every row has the exit states in front of ``num_drafts`` drafts."""
        return bool((self.num_valid_np[idx_mapping_np] >= num_drafts).all())

    def store(
        self,
        step: int,
        idx_mapping: torch.Tensor,  # [R]; -1 stores nothing
        hidden_states: torch.Tensor,  # [>= R, H]
        residual: torch.Tensor,  # [>= R, H]
    ) -> None:
        hidden_size = self.states.shape[-1]
        _store_kernel[(idx_mapping.shape[0],)](
            self.states[0, :, step],
            self.states[1, :, step],
            self.states.stride(1),
            idx_mapping,
            hidden_states,
            hidden_states.stride(0),
            residual,
            residual.stride(0),
            hidden_size,
            BLOCK_SIZE=triton.next_power_of_2(hidden_size),
        )

    def state_indices(
        self,
        idx_mapping: torch.Tensor,  # [R]
        num_drafts: int,
    ) -> torch.Tensor:
        """``[R * (num_drafts + 1)]`` indices for ``gather``.

        Token j of a row was the input of draft pass j. The last one, the last draft, was
        never an input; it repeats its neighbour's index and is filled in by the caller.
        """
        passes = torch.arange(num_drafts + 1, device=idx_mapping.device).clamp_(max=num_drafts - 1)
        return (idx_mapping[:, None] * self.num_speculative_tokens + passes).flatten()

    def gather(
        self,
        state_indices: torch.Tensor,  # [T]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New ``[T, H]`` hidden_states and residual."""
        hidden_states, residual = self.states.flatten(1, 2)
        return hidden_states[state_indices], residual[state_indices]


@triton.jit
def _store_kernel(  # type: ignore[no-untyped-def]
    hidden_states_out_ptr,  # [S, H], one draft step's view
    residual_out_ptr,  # [S, H]
    out_stride,
    idx_mapping_ptr,  # [R]
    hidden_states_ptr,  # [R, H]
    hidden_states_stride,
    residual_ptr,  # [R, H]
    residual_stride,
    hidden_size,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    req_state_idx = tl.load(idx_mapping_ptr + row)
    if req_state_idx < 0:
        return
    block = tl.arange(0, BLOCK_SIZE)
    mask = block < hidden_size
    out = req_state_idx.to(tl.int64) * out_stride + block
    hidden_states = tl.load(hidden_states_ptr + row * hidden_states_stride + block, mask=mask)
    residual = tl.load(residual_ptr + row * residual_stride + block, mask=mask)
    tl.store(hidden_states_out_ptr + out, hidden_states, mask=mask)
    tl.store(residual_out_ptr + out, residual, mask=mask)
