# SPDX-License-Identifier: Apache-2.0
"""Which LoRA adapter each row of a pass gets.

vLLM maps rows to adapters once a step, for the target's forward: a row per scheduled token, and
for the LM head a row per request. Two passes have other rows:

* verification has 1 + K rows of logits per request, but Model Runner V2 maps one. Without the
  right rows its tokens would be another adapter's;
* a draft pass has one row per request. With another row's adapter its drafts would be rejected.

With LoRA every verify step is the ordinary forward, which writes the K/V of every draft again. No
exit states are reused: the early stage would need a mapping of its own in the middle of a forward.
Drafts run without CUDA graphs, whose captured kernels would depend on the number of active
adapters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from vllm.lora.layers import LoRAMapping
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.lora_utils import NO_LORA_ID


class LoraRows:
    """Sets vLLM's row mapping for the passes that vLLM does not know.

    Args:
        model: the target; before the first pass vLLM wraps its layers for LoRA, which sets its
            ``lora_manager``.
        max_num_reqs: number of request slots.
    """

    def __init__(self, model: nn.Module, max_num_reqs: int) -> None:
        self._model = model
        self._lora_ids = np.full(max_num_reqs, NO_LORA_ID, dtype=np.int32)  # by request slot

    def add_request(self, req_index: int, lora_request: Any | None) -> None:
        """A request took a slot; ``lora_request`` is its adapter, None for the base model."""
        self._lora_ids[req_index] = NO_LORA_ID if lora_request is None else lora_request.lora_int_id

    def map_verify(self, input_batch: InputBatch) -> None:
        """Map the target's rows, and its 1 + K rows of logits per verified request."""
        lora_ids = self._lora_ids[input_batch.idx_mapping_np]
        self._map(
            lora_ids.repeat(input_batch.num_scheduled_tokens),
            lora_ids.repeat(np.diff(input_batch.cu_num_logits_np)),
        )

    def map_drafts(self, input_batch: InputBatch, dummy_run: bool) -> None:
        """Map one row per request, in the layers and in the LM head."""
        lora_ids = (
            np.full(input_batch.num_reqs, NO_LORA_ID, dtype=np.int32)
            if dummy_run
            else self._lora_ids[input_batch.idx_mapping_np]
        )
        self._map(lora_ids, lora_ids)

    def _map(
        self,
        token_lora_ids: np.ndarray,  # [T]
        logits_lora_ids: np.ndarray,  # [number of rows of logits]
    ) -> None:
        # The runner has loaded this batch's adapters themselves.
        self._model.lora_manager.set_adapter_mapping(
            LoRAMapping(tuple(token_lora_ids), tuple(logits_lora_ids), is_prefill=True)
        )
