# SPDX-License-Identifier: Apache-2.0
"""Gemma: embeddings scaled by the backbone, heads that may be the embedding itself."""

from __future__ import annotations

from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM

from vllm_layerskip.models.stages import EmbeddingHead, LayerSkipForCausalLM


class LayerSkipGemmaForCausalLM(LayerSkipForCausalLM, GemmaForCausalLM):
    """As Llama; embeddings are scaled."""


class LayerSkipGemma2ForCausalLM(EmbeddingHead, LayerSkipForCausalLM, Gemma2ForCausalLM):
    """Soft caps of attention and logits, norms after each block, interleaved windows."""


class LayerSkipGemma3ForCausalLM(LayerSkipForCausalLM, Gemma3ForCausalLM):
    """Norms of queries and keys instead of soft caps, two rotary bases, interleaved windows."""
