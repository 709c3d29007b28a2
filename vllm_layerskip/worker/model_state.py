# SPDX-License-Identifier: Apache-2.0
"""Decides, before each forward, whether a verify step reuses exit states.

Why reuse is exact. A verify step may start from exit states only if those are what the
early stage would compute now:

* every row is a decode whose tokens are ``last_sampled, d1..dn``, the inputs of the last
  propose in the same order and positions, and early layers' K/V of ``last_sampled,
  d1..d(n-1)`` are in the pages already, written by the same passes. Then the early
  stage lacks nothing but dn, and the forward runs it for dn;
* a prefill row, even one of a single token padded with placeholder drafts, has no exit
  states (``has_prefill``); nor has a row whose slot changed hands (``ExitStates.cover``);
* rows have equal numbers of drafts, as the scheduler gives a decode batch; a mixed batch
  takes the ordinary forward, which needs no exit state and is always correct.

FULL CUDA graphs. vLLM captures a decode graph per padded batch size and number of tokens per
request; those of two tokens or more are captured with reuse, and vLLM may replay one for a
batch whose rows lack exit states (it counts a cached prompt's last token as a decode). Such a
batch keeps its graph: the early stage first runs for it here, over all its tokens, and leaves the
exit states that the graph reads. Where prefills and decodes share their FULL graphs
(``cudagraph_mode=FULL``), these hold the ordinary forward.

The decision looks at the batch and never at the order of calls. vLLM also calls
``prepare_attn`` for dummy batches and for graph captures, the speculator's included, and those
carry no drafts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.triton_utils import tl, triton
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
    init_attn_backend,
)
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import AttentionGroup

from vllm_layerskip.config.layerskip_config import LayerSkipConfig
from vllm_layerskip.metrics.step_counts import StepCounts
from vllm_layerskip.worker.draft_inputs import ROWS_PER_PROGRAM
from vllm_layerskip.worker.early_layers import early_attn_layer_names
from vllm_layerskip.worker.logprob_rejection_sampler import LogprobRejectionSampler
from vllm_layerskip.worker.verify_plan import VerifyAttnMetadata, VerifyPlan

WARMUP_PREFIX = "_warmup_"
"""Starts the ids of the requests that vLLM's ``warmup_kernels`` makes up on a GPU before the first
real one."""


class LayerSkipModelState(DefaultModelState):
    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        config = vllm_config.speculative_config
        assert isinstance(config, LayerSkipConfig)
        self.config = config
        self.draft_state = model.draft_state
        self.step_counts = StepCounts()  # With the memory, once the speculator is loaded.
        self._num_weight_changes = model.num_weight_changes
        self.early_attn_groups: list[list[AttentionGroup]] = []
        # Plans point at these; captured graphs read them again at each replay.
        self.idx_mapping = torch.full((self.max_num_reqs,), -1, dtype=torch.int64, device=device)
        self.query_start_loc = torch.zeros(self.max_num_reqs + 1, dtype=torch.int32, device=device)
        self.slot_mappings: torch.Tensor | None = None  # [num_kv_cache_groups, max_num_reqs]

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        return sampler, LogprobRejectionSampler(sampler, self.config, self.device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.draft_state.exit_states.invalidate(req_index)
        if self.draft_state.lora_rows is not None:
            self.draft_state.lora_rows.add_request(req_index, new_req_data.lora_request)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        # The early stage has its own builders: a backend may keep buffers in a builder, and this
        # step's late stage and the drafts use other shapes.
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        self.early_attn_groups, _, _ = init_attn_backend(
            kv_cache_config,
            self.vllm_config,
            self.device,
            active_layer_names=early_attn_layer_names(set(layers), self.config.exit_layer),
        )
        self.slot_mappings = torch.zeros(
            len(kv_cache_config.kv_cache_groups),
            self.max_num_reqs,
            dtype=block_tables.slot_mappings.dtype,
            device=self.device,
        )

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,  # [num_kv_cache_groups, T]
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        self._forget_other_weights()
        covered = self._covered(input_batch)
        if for_capture or cudagraph_mode == CUDAGraphMode.FULL:
            reuses = self._graph_reuses(input_batch)
            num_reqs = input_batch.num_reqs_after_padding
        else:
            reuses, num_reqs = covered, input_batch.num_reqs
        if reuses and not (covered or for_capture):
            # Runs before the graph's own metadata, which a backend keeps in buffers of the graph.
            self._compute_exit_states(
                input_batch, block_tables, slot_mappings, attn_groups, kv_cache_config
            )
        attn_metadata = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture=for_capture,
            **kwargs,
        )
        if input_batch.num_draft_tokens_per_req is not None:
            if self.draft_state.lora_rows is not None:
                self.draft_state.lora_rows.map_verify(input_batch)
            self._count(input_batch, reuses and covered)
        if not reuses:
            return attn_metadata
        plan = self._plan_verify(
            input_batch, num_reqs, block_tables, slot_mappings, kv_cache_config, for_capture
        )
        return VerifyAttnMetadata(attn_metadata, plan)

    def _count(self, input_batch: InputBatch, reused: bool) -> None:
        if not input_batch.req_ids[0].startswith(WARMUP_PREFIX):
            self.step_counts = self.step_counts.after_step(reused)

    def _forget_other_weights(self) -> None:
        """Drop exit states of older weights: requests may run on while weights are replaced."""
        if self._num_weight_changes != self.model.num_weight_changes:
            self._num_weight_changes = self.model.num_weight_changes
            self.draft_state.exit_states.invalidate_all()

    def _covered(self, input_batch: InputBatch) -> bool:
        """Whether every row verifies the same number of drafts and has their exit states."""
        if not self.config.reuse_exit_states or input_batch.has_prefill:
            return False
        num_draft_tokens_np = input_batch.num_draft_tokens_per_req
        if num_draft_tokens_np is None:
            return False
        num_speculative_tokens = int(num_draft_tokens_np[0])
        return (
            num_speculative_tokens >= 1
            and bool((num_draft_tokens_np == num_speculative_tokens).all())
            and bool((input_batch.num_scheduled_tokens == num_speculative_tokens + 1).all())
            and self.draft_state.exit_states.cover(
                input_batch.idx_mapping_np, num_speculative_tokens
            )
        )

    def _graph_reuses(self, input_batch: InputBatch) -> bool:
        """Whether this batch's FULL graph was, or will be, captured with reuse."""
        return (
            self.config.reuse_exit_states
            and self.vllm_config.compilation_config.cudagraph_mode.separate_routine()
            # One token per request verifies nothing; a graph of the speculator has only one.
            and input_batch.num_tokens_after_padding > input_batch.num_reqs_after_padding
        )

    def _plan_verify(
        self,
        input_batch: InputBatch,
        num_reqs: int,  # R, with the padding of a FULL graph
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,  # [num_kv_cache_groups, T]
        kv_cache_config: KVCacheConfig,
        for_capture: bool,
    ) -> VerifyPlan:
        num_speculative_tokens = int(input_batch.num_scheduled_tokens[0]) - 1
        # The rows of a capture or a dummy replay have queries but no request.
        num_queries = input_batch.num_reqs
        num_requests = 0 if for_capture else num_queries
        assert self.slot_mappings is not None
        _prepare_plan_kernel[(triton.cdiv(num_reqs, ROWS_PER_PROGRAM),)](
            self.idx_mapping,
            self.query_start_loc,
            self.slot_mappings,
            self.slot_mappings.stride(0),
            input_batch.idx_mapping,
            slot_mappings,
            slot_mappings.stride(0),
            num_requests,
            num_queries,
            num_reqs,
            num_speculative_tokens,
            NUM_KV_CACHE_GROUPS=slot_mappings.shape[0],
            BLOCK_SIZE=ROWS_PER_PROGRAM,
        )
        early_slot_mappings = self.slot_mappings[:, :num_reqs]
        seq_lens_cpu_upper_bound = input_batch.seq_lens_cpu_upper_bound
        attn_metadata = build_attn_metadata(
            attn_groups=self.early_attn_groups,
            num_reqs=num_reqs,
            num_tokens=num_reqs,
            query_start_loc_gpu=self.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32).clamp_(
                max=num_queries
            ),
            max_query_len=1,
            seq_lens=input_batch.seq_lens,
            # A captured graph must serve every length.
            max_seq_len=(
                self.max_model_len
                if for_capture
                else int(seq_lens_cpu_upper_bound[:num_queries].max())
            ),
            block_tables=block_tables,
            slot_mappings=early_slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
            for_cudagraph_capture=for_capture,
        )
        return VerifyPlan(
            num_speculative_tokens=num_speculative_tokens,
            idx_mapping=self.idx_mapping[:num_reqs],
            attn_metadata=attn_metadata,
            slot_mappings=build_slot_mappings_by_layer(early_slot_mappings, kv_cache_config),
        )

    def _compute_exit_states(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,  # [num_kv_cache_groups, T]
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Run the early stage over the whole batch; it writes the K/V that the forward writes.

        It runs eagerly, with an eager step's metadata and without the padding of the graph to come.
        """
        num_reqs, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        slot_mappings = slot_mappings[:, :num_tokens]
        attn_metadata = super().prepare_attn(
            input_batch,
            CUDAGraphMode.NONE,
            tuple(block_table[:num_reqs] for block_table in block_tables),
            slot_mappings,
            attn_groups,
            kv_cache_config,
        )
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            slot_mapping=build_slot_mappings_by_layer(slot_mappings, kv_cache_config),
        ):
            hidden_states, residual = self.model.run_early_stage(
                input_batch.input_ids[:num_tokens], input_batch.positions[:num_tokens]
            )
        self.draft_state.exit_states.store_all(
            input_batch.idx_mapping,
            hidden_states,
            residual,
            num_speculative_tokens=int(input_batch.num_scheduled_tokens[0]) - 1,
        )


# One compiled variant (see draft_inputs.py): a capture has no requests, a batch any number.
@triton.jit(do_not_specialize=["num_requests", "num_queries", "num_reqs", "num_speculative_tokens"])
def _prepare_plan_kernel(  # type: ignore[no-untyped-def]
    idx_mapping_out_ptr,  # [max_num_reqs]
    query_start_loc_out_ptr,  # [max_num_reqs + 1]
    slot_mappings_out_ptr,  # [num_kv_cache_groups, max_num_reqs]
    slot_mappings_out_stride,
    idx_mapping_ptr,  # [num_requests]
    slot_mappings_ptr,  # [num_kv_cache_groups, T]
    slot_mappings_stride,
    num_requests,
    num_queries,
    num_reqs,  # with padding
    num_speculative_tokens,
    NUM_KV_CACHE_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    in_batch = row < num_reqs
    is_request = row < num_requests
    idx_mapping = tl.load(idx_mapping_ptr + row, mask=is_request, other=-1)
    tl.store(idx_mapping_out_ptr + row, idx_mapping, mask=in_batch)
    tl.store(query_start_loc_out_ptr, 0)  # Sleep level 2 discards its initial 0.
    # Padding has no query.
    query_end = tl.minimum(row + 1, num_queries)
    tl.store(query_start_loc_out_ptr + row + 1, query_end, mask=in_batch)
    last_draft = row * (num_speculative_tokens + 1) + num_speculative_tokens
    for group in tl.static_range(NUM_KV_CACHE_GROUPS):
        # The last draft's slot; padding already is PAD in vLLM's slot mappings.
        slot = tl.load(slot_mappings_ptr + group * slot_mappings_stride + last_draft, mask=in_batch)
        tl.store(
            slot_mappings_out_ptr + group * slot_mappings_out_stride + row, slot, mask=in_batch
        )
