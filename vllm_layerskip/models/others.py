# SPDX-License-Identifier: Apache-2.0
"""Families whose defaults are Llama's: they override nothing."""

from __future__ import annotations

from vllm.model_executor.models.apertus import ApertusForCausalLM
from vllm.model_executor.models.glm4 import Glm4ForCausalLM
from vllm.model_executor.models.nemotron import NemotronForCausalLM

from vllm_layerskip.models.stages import LayerSkipForCausalLM


class LayerSkipApertusForCausalLM(LayerSkipForCausalLM, ApertusForCausalLM):
    """As Llama, with xIELU activations."""


class LayerSkipGlm4ForCausalLM(LayerSkipForCausalLM, Glm4ForCausalLM):
    """As Llama, with norms after each block."""


class LayerSkipNemotronForCausalLM(LayerSkipForCausalLM, NemotronForCausalLM):
    """As Llama, with LayerNorm and squared ReLU."""
