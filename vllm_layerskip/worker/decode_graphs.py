# SPDX-License-Identifier: Apache-2.0
"""Decode graphs for every number of drafts of a batch-size schedule.

With a schedule vLLM captures decode graphs of several query lengths, 1 + each number of drafts,
and offers a batch only those of the next captured token count. A batch of 3 without drafts is
then offered the graph of one request with 2 drafts (3 tokens) and not that of 4 requests
without (4 tokens), and runs without a FULL graph, slower than with no schedule at all. Here a
batch is offered all graphs that are large enough, smallest first; vLLM picks the first one
that fits its query length.

vLLM also captures each size for each query length, most of which the schedule never asks for:
161 graphs instead of 35 for four numbers of drafts and 128 requests. A graph stays if the
schedule gives its number of drafts to a batch size that pads to it, or if it is for one request.
A batch that shrank since it drafted pads to the next larger graph. A batch that grew, by a cached
prompt's last token, may find none; it then runs as any batch without a FULL graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

from vllm_layerskip.config.layerskip_config import LayerSkipConfig
from vllm_layerskip.host.wrap import wrap
from vllm_layerskip.worker.draft_graphs import num_speculative_tokens_by_batch_size


def offer_all_decode_graphs() -> None:
    """Wrap vLLM's choice of candidates; engines without LayerSkip keep vLLM's."""
    wrap(CudaGraphManager, "_init_candidates", _init_candidates)


def _init_candidates(original: Callable) -> Callable:
    def init_candidates(self: Any) -> None:
        original(self)
        config = self.vllm_config.speculative_config
        if isinstance(config, LayerSkipConfig) and config.uses_dynamic_speculative_decoding():
            if isinstance(self, ModelCudaGraphManager):  # Draft graphs have lengths of their own.
                _keep_scheduled(self)
            _offer_all(self)

    return init_candidates


def _keep_scheduled(manager: Any) -> None:
    """Drop the decode graphs for a K that the schedule gives to no batch of their size."""
    by_batch_size = num_speculative_tokens_by_batch_size(manager.vllm_config)
    full = manager._capture_descs.get(CUDAGraphMode.FULL)
    if not full:
        return  # An entry, even an empty one, would make vLLM capture.
    kept, smallest = set(), Counter[tuple[int | None, int]]()
    for desc in sorted(full, key=lambda desc: desc.num_tokens):
        # Each query length (and number of adapters) has a range of batch sizes of its own.
        key = desc.uniform_token_count, desc.num_active_loras
        wanted = by_batch_size[smallest[key] + 1 : desc.num_reqs + 1]
        smallest[key] = desc.num_reqs
        q = desc.uniform_token_count
        if q is None or desc.num_reqs == 1 or q - 1 in wanted:
            kept.add(desc)
    manager._capture_descs[CUDAGraphMode.FULL] = [desc for desc in full if desc in kept]


def _offer_all(manager: Any) -> None:
    full = sorted(
        manager._capture_descs.get(CUDAGraphMode.FULL, ()), key=lambda desc: desc.num_tokens
    )
    for key, candidates in manager._candidates.items():
        num_tokens, num_active_loras = key
        large_enough = [
            desc
            for desc in full
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_active_loras
        ]
        others = [desc for desc in candidates if desc.cg_mode != CUDAGraphMode.FULL]
        manager._candidates[key] = large_enough + others
