# SPDX-License-Identifier: Apache-2.0
"""Qwen, and MiMo, which vLLM derives from it."""

from __future__ import annotations

import torch
from vllm.model_executor.models.mimo import MiMoForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_layerskip.models.stages import LayerSkipForCausalLM


class LayerSkipQwen2ForCausalLM(LayerSkipForCausalLM, Qwen2ForCausalLM):
    """As Llama, with biases in the attention."""


class LayerSkipQwen3ForCausalLM(LayerSkipForCausalLM, Qwen3ForCausalLM):
    """As Llama, with norms of queries and keys."""


class LayerSkipMiMoForCausalLM(LayerSkipForCausalLM, MiMoForCausalLM):
    """The head applies the last norm: multi-token prediction takes the state before it."""

    def final_norm(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return hidden_states + residual

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().get_top_tokens(self.model.norm(hidden_states))
