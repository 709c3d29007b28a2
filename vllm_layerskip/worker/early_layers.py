# SPDX-License-Identifier: Apache-2.0
"""Which attention layers belong to the early stage."""

from __future__ import annotations

from vllm.model_executor.models.utils import extract_layer_index


def early_attn_layer_names(attn_layer_names: set[str], exit_layer: int) -> set[str]:
    """Names of the attention layers of layers 0..E-1."""
    return {name for name in attn_layer_names if extract_layer_index(name) < exit_layer}
