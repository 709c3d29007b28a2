# SPDX-License-Identifier: Apache-2.0
"""Llama, and what vLLM derives from its Llama."""

from __future__ import annotations

from vllm.compilation.decorators import ignore_torch_compile
from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from vllm_layerskip.models.stages import LayerSkipForCausalLM


class LayerSkipLlamaForCausalLM(LayerSkipForCausalLM, LlamaForCausalLM):
    """vLLM's Llama, its forward in two stages; weights, names and head are unchanged."""


class LayerSkipMistralForCausalLM(LayerSkipForCausalLM, MistralForCausalLM):
    """As Llama; sliding windows are the layers' own."""


class LayerSkipPhi3ForCausalLM(LayerSkipForCausalLM, Phi3ForCausalLM):
    """As Llama, with fused projections in the checkpoint."""


@ignore_torch_compile  # vLLM compiles this class as a whole; here its stages are compiled.
class LayerSkipErnie4_5ForCausalLM(LayerSkipForCausalLM, Ernie4_5ForCausalLM):
    """As Llama, with interleaved rotary embeddings."""
