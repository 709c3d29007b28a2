# SPDX-License-Identifier: Apache-2.0
"""Decides, before each forward, whether a verify step reuses exit states.

Why reuse is exact. A verify step may start from exit states only if those are what the
early stage would compute now:

* every row is a decode whose tokens are ``last_sampled, d1..dn``, the inputs of the last
  propose in the same order and positions, and early layers' K/V of ``last_sampled,
  d1..d(n-1)`` are in the pages already, written by the same passes. Then nothing of the
  early stage is missing but dn, for which it runs here;
* a prefill row, even one of a single token padded with placeholder drafts, has no exit
  states (``has_prefill``); nor has a row whose slot changed hands (``ExitStates.cover``);
* rows have equal numbers of drafts, as the scheduler gives a decode batch; a mixed batch
  takes the ordinary forward, which needs no exit state and is always correct.

The decision looks at the batch and never at the order of calls: vLLM calls
``prepare_attn`` for dummy batches and graph captures too, and those carry no drafts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
    init_attn_backend,
)
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_layerskip.config import LayerSkipConfig
from vllm_layerskip.models.stages import VerifyPlan, early_attn_layer_names


@dataclass
class VerifyStats:
    """Verify steps since the engine started; a step verifies one batch."""

    num_verify_steps_reused: int = 0
    """Steps that ran the early stage for one token per request."""
    num_verify_steps_full: int = 0
    """Steps that ran the ordinary forward."""

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class LayerSkipModelState(DefaultModelState):
    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        config = vllm_config.speculative_config
        assert isinstance(config, LayerSkipConfig)
        self.config = config
        assert model.exit_states is not None, "the speculator loads before the model state"
        self.exit_states = model.exit_states
        self.stats = VerifyStats()
        self.early_attn_groups: list[list[AttentionGroup]] = []
        self.verify_plan: VerifyPlan | None = None
        self.arange = torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)
        self.arange_cpu = torch.arange(self.max_num_reqs + 1, dtype=torch.int32)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.exit_states.invalidate(req_index)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        # Builders of their own: a backend may keep buffers in a builder, and this step's
        # late stage and the drafts use other shapes.
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        self.early_attn_groups, _, _ = init_attn_backend(
            kv_cache_config,
            self.vllm_config,
            self.device,
            active_layer_names=early_attn_layer_names(set(layers), self.config.exit_layer),
        )

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
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
        self.verify_plan = None
        if input_batch.num_draft_tokens_per_req is not None:
            if self._may_reuse(input_batch, cudagraph_mode):
                self.verify_plan = self._plan_verify(
                    input_batch, block_tables, slot_mappings, kv_cache_config
                )
                self.stats.num_verify_steps_reused += 1
            else:
                self.stats.num_verify_steps_full += 1
        return attn_metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        model_inputs = super().prepare_inputs(input_batch, req_states)
        plan, self.verify_plan = self.verify_plan, None
        return model_inputs if plan is None else {**model_inputs, "verify_plan": plan}

    def _may_reuse(self, input_batch: InputBatch, cudagraph_mode: CUDAGraphMode) -> bool:
        num_drafts_np: np.ndarray = input_batch.num_draft_tokens_per_req
        num_drafts = int(num_drafts_np[0])
        return (
            self.config.reuse_exit_states
            # A captured graph holds the ordinary forward.
            and cudagraph_mode == CUDAGraphMode.NONE
            and input_batch.num_tokens_after_padding == input_batch.num_tokens
            and not input_batch.has_prefill
            and num_drafts >= 1
            and bool((num_drafts_np == num_drafts).all())
            and bool((input_batch.num_scheduled_tokens == num_drafts + 1).all())
            and self.exit_states.cover(input_batch.idx_mapping_np, num_drafts)
        )

    def _plan_verify(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,  # [num_kv_cache_groups, T]
        kv_cache_config: KVCacheConfig,
    ) -> VerifyPlan:
        num_reqs = input_batch.num_reqs
        num_drafts = int(input_batch.num_draft_tokens_per_req[0])
        last_draft_indices = input_batch.query_start_loc[1 : num_reqs + 1].long() - 1
        early_slot_mappings = slot_mappings[:, last_draft_indices]
        seq_lens_cpu_upper_bound = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
        attn_metadata = build_attn_metadata(
            attn_groups=self.early_attn_groups,
            num_reqs=num_reqs,
            num_tokens=num_reqs,
            query_start_loc_gpu=self.arange[: num_reqs + 1],
            query_start_loc_cpu=self.arange_cpu[: num_reqs + 1],
            max_query_len=1,
            seq_lens=input_batch.seq_lens,
            max_seq_len=int(seq_lens_cpu_upper_bound.max()),
            block_tables=block_tables,
            slot_mappings=early_slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
            positions=input_batch.positions[last_draft_indices],
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
        )
        return VerifyPlan(
            state_indices=self.exit_states.state_indices(input_batch.idx_mapping, num_drafts),
            last_draft_indices=last_draft_indices,
            attn_metadata=attn_metadata,
            slot_mappings=build_slot_mappings_by_layer(early_slot_mappings, kv_cache_config),
        )
