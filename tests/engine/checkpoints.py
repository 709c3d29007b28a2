# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints, each made to test one thing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

EMBEDDED = Path(__file__).parents[2] / "vllm_layerskip" / "checkpoint"


def random_llama(
    folder: Path,
    num_layers: int = 4,
    vocab_size: int = 64,
    identity_from: int | None = None,
    logit_gain: float = 1.0,
    late_from: int | None = None,
    late_gain: float = 1.0,
    seed: int = 0,
) -> Path:
    """Save a random Llama and return its folder.

    Args:
        identity_from: layers from this one on add nothing to the residual stream.
        logit_gain: scales the output distribution's sharpness.
        late_from, late_gain: scale what layers from this one on add, so that early layers
            predict some of the model's tokens and miss others.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(logit_gain)
        for layer in model.model.layers[num_layers if identity_from is None else identity_from :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for layer in model.model.layers[num_layers if late_from is None else late_from :]:
            layer.self_attn.o_proj.weight.mul_(late_gain)
            layer.mlp.down_proj.weight.mul_(late_gain)
    model.save_pretrained(folder)
    return folder


def with_config(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a checkpoint, by links, with keys of config.json changed or (None) removed."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def chatting(folder: Path) -> Path:
    """The embedded checkpoint with a chat template whose turns are lines of Python.

    It was trained on none. Here the token that closes a turn is a little more probable than the
    line end, wherever that is: questions and answers end.
    """
    shutil.copytree(EMBEDDED, folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    embedding[tokens["</s>"]] = 1.02 * embedding[tokens["\u010a"]]  # Byte-level BPE's line feed.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    return folder


def load_reference(folder: Path) -> LlamaForCausalLM:
    """The checkpoint in transformers, float32: the reference that shares no code with vLLM."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
