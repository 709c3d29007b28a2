# SPDX-License-Identifier: Apache-2.0
"""Decode graphs for every number of drafts of a batch-size schedule.

With a schedule vLLM captures decode graphs of several query lengths, 1 + each number of drafts,
and offers a batch only those of the next captured token count. A batch of 3 without drafts is
then offered the graph of one request with 2 drafts (3 tokens) and not that of 4 requests
without (4 tokens), and runs without a FULL graph, slower than with no schedule at all. Here a
batch is offered all graphs that are large enough, smallest first; vLLM picks the first one
that fits its query length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_layerskip import host
from vllm_layerskip.config import LayerSkipConfig


def offer_all_decode_graphs() -> None:
    """Wrap vLLM's choice of candidates; engines without LayerSkip keep theirs."""
    host.wrap(CudaGraphManager, "_init_candidates", _init_candidates)


def _init_candidates(original: Callable) -> Callable:
    def init_candidates(self: Any) -> None:
        original(self)
        config = self.vllm_config.speculative_config
        if isinstance(config, LayerSkipConfig) and config.uses_dynamic_speculative_decoding():
            _offer_all(self)

    return init_candidates


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
