# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of drafting: one graph holds all draft passes of a batch.

vLLM's manager captures, pads and dispatches. Ours says which graphs exist: one per padded
batch size and number of drafts that the batch-size schedule can ask for there. A batch
without a graph drafts eagerly.
"""

from __future__ import annotations

import copy

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)


class DraftCudaGraphManager(SpeculatorCudaGraphManager):
    compilation_config: CompilationConfig
    _capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]]

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, cudagraph_mode: CUDAGraphMode
    ) -> None:
        super().__init__(vllm_config, device, cudagraph_mode, decode_query_len=1)
        by_batch_size = num_speculative_tokens_by_batch_size(vllm_config)
        self._capture_descs = {
            mode: _for_each_number_of_drafts(descs, by_batch_size)
            for mode, descs in self._capture_descs.items()
        }

    def _init_candidates(self) -> None:
        """Add a full batch to vLLM's sizes.

        With speculation vLLM adds a full batch's verification to its sizes, but not the full
        batch of one token per request: at ``max_num_seqs=100`` the largest would be 96.
        """
        config: CompilationConfig = self.compilation_config
        sizes = config.cudagraph_capture_sizes
        if self.cudagraph_mode and sizes and self.max_num_reqs <= max(sizes):
            config = copy.copy(config)
            config.cudagraph_capture_sizes = sorted({*sizes, self.max_num_reqs})
            self.compilation_config = config
        super()._init_candidates()

    def dispatch_drafts(
        self, num_reqs: int, num_speculative_tokens: int
    ) -> BatchExecutionDescriptor:
        """The graph that drafts for a batch, or an eager descriptor of the batch's own size."""
        desc = self.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)
        desc = self.specialize_spec_tokens(desc, num_speculative_tokens)
        if desc.cg_mode == CUDAGraphMode.FULL:
            return desc
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_reqs,
            num_reqs=num_reqs,
            uniform_token_count=1,
        )


def num_speculative_tokens_by_batch_size(vllm_config: VllmConfig) -> list[int]:
    """K for a batch of ``index`` requests; index 0 is unused."""
    config = vllm_config.speculative_config
    max_num_reqs = vllm_config.scheduler_config.max_num_seqs
    if not config.uses_dynamic_speculative_decoding():
        return [config.num_speculative_tokens] * (max_num_reqs + 1)
    return build_dynamic_sd_schedule_lookup(
        config.num_speculative_tokens_per_batch_size,
        vllm_max_batch_size=max_num_reqs,
        vllm_num_speculative_tokens=config.num_speculative_tokens,
    )


def _for_each_number_of_drafts(
    descs: list[BatchExecutionDescriptor], by_batch_size: list[int]
) -> list[BatchExecutionDescriptor]:
    """For each size, one descriptor for every K of the batch sizes that pad to it."""
    result = []
    smallest = 1
    for desc in sorted(descs, key=lambda desc: desc.num_tokens):
        wanted = set(by_batch_size[smallest : desc.num_tokens + 1])
        result += [
            SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=count)
            for count in sorted(wanted - {0})
        ]
        smallest = desc.num_tokens + 1
    return result[::-1]  # The largest first, as vLLM captures.
