# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters with random weights, saved by peft as a user's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

LAYER_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_MODULES = (*LAYER_MODULES, "embed_tokens", "lm_head")


def random_adapter(
    checkpoint: Path, folder: Path, target_modules: Any, seed: int, gain: float
) -> Path:
    """Save an adapter for a checkpoint and return its folder.

    Args:
        target_modules: names of the modules that it adapts, or a regular expression.
        gain: standard deviation of the entries of A and B.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=gain)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder
