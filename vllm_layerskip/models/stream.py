# SPDX-License-Identifier: Apache-2.0
"""Models whose layers add to the residual stream themselves."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.models.exaone4 import Exaone4ForCausalLM
from vllm.model_executor.models.granite import GraniteForCausalLM
from vllm.model_executor.models.hyperclovax import HyperCLOVAXForCausalLM
from vllm.model_executor.models.stablelm import StablelmForCausalLM

from vllm_layerskip.models.stages import LayerSkipForCausalLM, StreamDecoder


class LayerSkipGraniteForCausalLM(StreamDecoder, LayerSkipForCausalLM, GraniteForCausalLM):
    """Multipliers of embeddings, residuals, attention and logits."""

    def scale_embeds(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds * self.config.embedding_multiplier


class _UnusedResidual(StreamDecoder):
    """Layers take and return a residual that they do not read."""

    def run_layer(
        self,
        layer: nn.Module,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:
        return layer(positions, hidden_states, None)[0], None


class LayerSkipHyperCLOVAXForCausalLM(
    _UnusedResidual, LayerSkipForCausalLM, HyperCLOVAXForCausalLM
):
    """Multipliers as in Granite, and norms after each block."""

    def scale_embeds(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds * self.config.embedding_multiplier


class LayerSkipExaone4ForCausalLM(_UnusedResidual, LayerSkipForCausalLM, Exaone4ForCausalLM):
    """Norms only after each block, interleaved windows, layers without rotary embedding."""


class LayerSkipStablelmForCausalLM(StreamDecoder, LayerSkipForCausalLM, StablelmForCausalLM):
    """LayerNorm with biases."""

    def run_layer(
        self,
        layer: nn.Module,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:
        return layer(positions, hidden_states)[0], None
