# SPDX-License-Identifier: Apache-2.0
"""Llama with an exit after layer E."""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM

from vllm_layerskip.models.stages import LayerSkipForCausalLM


class LayerSkipLlamaForCausalLM(LayerSkipForCausalLM, LlamaForCausalLM):
    """vLLM's Llama, its forward in two stages; weights, names and head are unchanged."""
