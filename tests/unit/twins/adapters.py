# SPDX-License-Identifier: Apache-2.0
"""A tiny base model and draft adapters for it, written without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from vllm_layerskip.twins.adapter import DraftAdapter, read_draft_adapter

BASE = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}
RANK = 4
PREFIX = "base_model.model.model.layers."


def settings(**changes: Any) -> dict[str, Any]:
    """What peft writes to adapter_config.json."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "acme/tiny",
        "r": RANK,
        "lora_alpha": 8,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [0, 1],
        "modules_to_save": None,
        "use_dora": False,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "rank_pattern": {},
    } | changes


def weights(num_layers: int = 2, rank: int = RANK) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(num_layers):
        for module, (num_outputs, num_inputs) in SHAPES.items():
            for part, shape in (("A", (rank, num_inputs)), ("B", (num_outputs, rank))):
                name = f"{PREFIX}{layer}.{module}.lora_{part}.weight"
                found[name] = torch.randn(shape, generator=generator)
    return found


def write(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config or settings()))
    save_file(dict(tensors or weights()), folder / "adapter_model.safetensors")
    if record is not None:
        (folder / "layerskip_adapter.json").write_text(json.dumps(record))
    return folder


def read(folder: Path, **arguments: Any) -> DraftAdapter:
    """Read an adapter for ``BASE``, which drafts after 2 of 4 layers."""
    defaults = {
        "hf_config": BASE,
        "base_name": "acme/tiny-copy",
        "num_layers": BASE.num_hidden_layers,
        "exit_layer": 2,
    }
    return read_draft_adapter(folder, f"draft_adapter={str(folder)!r}", **defaults | arguments)
