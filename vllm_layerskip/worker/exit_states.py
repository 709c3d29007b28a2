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

Both directions are one pass over memory: an exit state is copied from the early stage's
output to its slot, and from its slot to the late stage's input. Each kernel has one compiled
variant for all batch sizes (see ``draft_inputs.py``).

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

    def invalidate_all(self) -> None:
        self.num_valid_np.fill(0)

    def set_num_valid(
        self,
        idx_mapping_np: np.ndarray,  # [R]
        num_valid: np.ndarray | int,  # [R]
    ) -> None:
        self.num_valid_np[idx_mapping_np] = num_valid

    def cover(
        self,
        idx_mapping_np: np.ndarray,  # [R]
        num_speculative_tokens: int,
    ) -> bool:
        """Whether every row has the exit states that verifying its drafts starts from."""
        return bool((self.num_valid_np[idx_mapping_np] >= num_speculative_tokens).all())

    def _require_dtype(self, *states: torch.Tensor) -> None:
        # The kernels mix rows of both; on a GPU another dtype would not compile.
        assert all(state.dtype == self.states.dtype for state in states), (
            f"exit states are {[state.dtype for state in states]}, the model is "
            f"{self.states.dtype}: have the early stage return the model's dtype"
        )

    def store(
        self,
        step: int,
        idx_mapping: torch.Tensor,  # [R]; -1 stores nothing
        hidden_states: torch.Tensor,  # [>= R, H]
        residual: torch.Tensor,  # [>= R, H]
    ) -> None:
        """Keep what draft pass ``step`` left, one token a row."""
        self._store(self.states[:, :, step : step + 1], idx_mapping, hidden_states, residual, 1)

    def store_all(
        self,
        idx_mapping: torch.Tensor,  # [R]; -1 stores nothing
        hidden_states: torch.Tensor,  # [>= R * (num_speculative_tokens + 1), H]
        residual: torch.Tensor,  # as hidden_states
        num_speculative_tokens: int,
    ) -> None:
        """Keep the states of each row's tokens but the last, as if draft passes had left them."""
        states = self.states[:, :, :num_speculative_tokens]
        self._store(states, idx_mapping, hidden_states, residual, num_speculative_tokens + 1)

    def _store(
        self,
        states: torch.Tensor,  # [2, S, passes, H]
        idx_mapping: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        num_tokens_per_req: int,
    ) -> None:
        self._require_dtype(hidden_states, residual)
        hidden_size = self.states.shape[-1]
        _store_kernel[(idx_mapping.shape[0], states.shape[2])](
            states[0],
            states[1],
            self.states.stride(1),
            self.states.stride(2),
            idx_mapping,
            hidden_states,
            hidden_states.stride(0),
            residual,
            residual.stride(0),
            num_tokens_per_req,
            hidden_size,
            BLOCK_SIZE=triton.next_power_of_2(hidden_size),
        )

    def gather(
        self,
        idx_mapping: torch.Tensor,  # [R]; -1 gives zeros
        num_speculative_tokens: int,
        last_hidden_states: torch.Tensor,  # [R, H]
        last_residual: torch.Tensor,  # [R, H]
        num_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New ``[T, H]`` hidden_states and residual, for 1 + K tokens a row.

        Token j of a row was the input of draft pass j. The row's last token, the last draft, was
        never an input; the caller passes in its state. T may exceed the rows' tokens by
        padding, whose states are zero.
        """
        self._require_dtype(last_hidden_states, last_residual)
        hidden_size = self.states.shape[-1]
        hidden_states = self.states.new_empty(num_tokens, hidden_size)
        residual = self.states.new_empty(num_tokens, hidden_size)
        _gather_kernel[(num_tokens,)](
            hidden_states,
            residual,
            hidden_size,
            self.states[0],
            self.states[1],
            self.states.stride(1),
            self.states.stride(2),
            idx_mapping,
            idx_mapping.shape[0],
            last_hidden_states,
            last_hidden_states.stride(0),
            last_residual,
            last_residual.stride(0),
            num_speculative_tokens,
            BLOCK_SIZE=triton.next_power_of_2(hidden_size),
        )
        return hidden_states, residual


@triton.jit(do_not_specialize=["num_tokens_per_req"])
def _store_kernel(  # type: ignore[no-untyped-def]
    hidden_states_out_ptr,  # [S, passes, H]
    residual_out_ptr,  # [S, passes, H]
    req_stride,
    step_stride,
    idx_mapping_ptr,  # [R]
    hidden_states_ptr,  # [R * num_tokens_per_req, H]
    hidden_states_stride,
    residual_ptr,  # [R * num_tokens_per_req, H]
    residual_stride,
    num_tokens_per_req,
    hidden_size,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    step = tl.program_id(1)
    req_state_idx = tl.load(idx_mapping_ptr + row)
    if req_state_idx < 0:
        return
    block = tl.arange(0, BLOCK_SIZE)
    mask = block < hidden_size
    token = (row * num_tokens_per_req + step).to(tl.int64)
    out = req_state_idx.to(tl.int64) * req_stride + step * step_stride + block
    hidden_states = tl.load(hidden_states_ptr + token * hidden_states_stride + block, mask=mask)
    residual = tl.load(residual_ptr + token * residual_stride + block, mask=mask)
    tl.store(hidden_states_out_ptr + out, hidden_states, mask=mask)
    tl.store(residual_out_ptr + out, residual, mask=mask)


@triton.jit(do_not_specialize=["num_reqs", "num_speculative_tokens"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    hidden_states_out_ptr,  # [T, H]
    residual_out_ptr,  # [T, H]
    hidden_size,
    hidden_states_ptr,  # [S, K, H]
    residual_ptr,  # [S, K, H]
    req_stride,
    step_stride,
    idx_mapping_ptr,  # [R]
    num_reqs,
    last_hidden_states_ptr,  # [R, H]
    last_hidden_states_stride,
    last_residual_ptr,  # [R, H]
    last_residual_stride,
    num_speculative_tokens,
    BLOCK_SIZE: tl.constexpr,
):
    token = tl.program_id(0)
    row = token // (num_speculative_tokens + 1)
    step = token % (num_speculative_tokens + 1)
    block = tl.arange(0, BLOCK_SIZE)
    mask = block < hidden_size
    out = token.to(tl.int64) * hidden_size + block
    req_state_idx = tl.load(idx_mapping_ptr + row, mask=row < num_reqs, other=-1)
    if req_state_idx < 0:
        zero = tl.zeros([BLOCK_SIZE], dtype=hidden_states_out_ptr.dtype.element_ty)
        tl.store(hidden_states_out_ptr + out, zero, mask=mask)
        tl.store(residual_out_ptr + out, zero, mask=mask)
        return
    if step == num_speculative_tokens:
        hidden_states_ptr = last_hidden_states_ptr + row.to(tl.int64) * last_hidden_states_stride
        residual_ptr = last_residual_ptr + row.to(tl.int64) * last_residual_stride
    else:
        offset = req_state_idx.to(tl.int64) * req_stride + step * step_stride
        hidden_states_ptr = hidden_states_ptr + offset
        residual_ptr = residual_ptr + offset
    tl.store(hidden_states_out_ptr + out, tl.load(hidden_states_ptr + block, mask=mask), mask=mask)
    tl.store(residual_out_ptr + out, tl.load(residual_ptr + block, mask=mask), mask=mask)
