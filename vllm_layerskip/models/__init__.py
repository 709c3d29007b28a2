# SPDX-License-Identifier: Apache-2.0
"""Model classes that can stop after layer E, by the architecture that they replace.

To add a dense decoder whose layers are called ``layer(positions, hidden_states,
residual)``: derive its class from ``LayerSkipForCausalLM`` and vLLM's own, and list it
here. Importing this package imports no vLLM.
"""

from __future__ import annotations

from typing import NamedTuple


class LayerSkipModel(NamedTuple):
    architecture: str
    """Name under which our class stands in vLLM's registry."""
    path: str
    """``module:class``, imported on first use."""


SUPPORTED_ARCHITECTURES: dict[str, LayerSkipModel] = {
    "LlamaForCausalLM": LayerSkipModel(
        "LayerSkipLlamaForCausalLM", "vllm_layerskip.models.llama:LayerSkipLlamaForCausalLM"
    ),
}
