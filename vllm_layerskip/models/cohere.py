# SPDX-License-Identifier: Apache-2.0
"""Command R: attention and MLP in parallel, the embedding as the head."""

from __future__ import annotations

from vllm.model_executor.models.commandr import CohereForCausalLM

from vllm_layerskip.models.stages import EmbeddingHead, LayerSkipForCausalLM


class LayerSkipCohereForCausalLM(EmbeddingHead, LayerSkipForCausalLM, CohereForCausalLM):
    """Its layers return the residual stream, and their input as the residual."""
