# SPDX-License-Identifier: Apache-2.0
"""A tiny random checkpoint of each supported architecture, made by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

NUM_LAYERS = 4
WINDOW = 16
INTERLEAVED = ["sliding_attention", "full_attention"] * 2

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """How transformers makes a checkpoint of an architecture of vLLM."""

    config_class: str
    options: Mapping[str, Any] = field(default_factory=dict)
    embedding_std: float = 0.4
    """Its share of the residual stream decides how many drafts are accepted."""


MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.1,
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("LlamaConfig"),
    "LLaMAForCausalLM": Family("LlamaConfig", {"tie_word_embeddings": True}),
    "MistralForCausalLM": Family("MistralConfig", {"sliding_window": None}),
    "Ministral3ForCausalLM": Family("Ministral3Config", {"head_dim": 32, "rope_parameters": YARN}),
    "Qwen2ForCausalLM": Family("Qwen2Config"),
    "Qwen3ForCausalLM": Family("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    # transformers has no such class; vLLM's takes Qwen2's weights and config.
    "MiMoForCausalLM": Family("Qwen2Config"),
    "Phi3ForCausalLM": Family("Phi3Config"),
    "Ernie4_5ForCausalLM": Family("Ernie4_5Config", {"head_dim": 32}),
    "GemmaForCausalLM": Family(
        "GemmaConfig", {"head_dim": 32, "tie_word_embeddings": True}, embedding_std=0.03
    ),
    "Gemma2ForCausalLM": Family(
        "Gemma2Config",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "layer_types": INTERLEAVED,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
        embedding_std=0.2,
    ),
    "Gemma3ForCausalLM": Family(
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "layer_types": INTERLEAVED,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
        },
        embedding_std=0.2,
    ),
    "Glm4ForCausalLM": Family("Glm4Config", {"head_dim": 32}),
    "ApertusForCausalLM": Family("ApertusConfig", {"rope_parameters": DEFAULT_ROPE}),
    "NemotronForCausalLM": Family("NemotronConfig"),
    "CohereForCausalLM": Family("CohereConfig", {"tie_word_embeddings": True}),
    "Cohere2ForCausalLM": Family(
        "Cohere2Config",
        {"tie_word_embeddings": True, "layer_types": INTERLEAVED, "sliding_window": WINDOW},
    ),
    "GraniteForCausalLM": Family("GraniteConfig", MULTIPLIERS),
    "GraniteSWAForCausalLM": Family(
        "GraniteSWAConfig",
        MULTIPLIERS | {"layer_types": INTERLEAVED, "sliding_window": WINDOW},
    ),
    "HyperCLOVAXForCausalLM": Family("HyperCLOVAXConfig", MULTIPLIERS),
    "Exaone4ForCausalLM": Family(
        "Exaone4Config", {"layer_types": INTERLEAVED, "sliding_window": WINDOW}
    ),
    "StableLmForCausalLM": Family("StableLmConfig"),
}


def random_checkpoint(folder: Path, architecture: str, **options: Any) -> Path:
    """Save a random model of ``architecture`` and return its folder.

    Its drafts are accepted now and then: the embedding weighs as much as the layers in the
    residual stream, and signs in the last norm keep a tied head from repeating the last token.
    """
    torch.manual_seed(0)
    family = FAMILIES[architecture]
    config = getattr(transformers, family.config_class)(**TINY | dict(family.options) | options)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn_like(embedding) * family.embedding_std)
        norm = model.get_decoder().norm.weight
        one = 1.0 - float(norm[0])  # Some norms add their weight to one.
        norm.copy_(torch.randint(0, 2, norm.shape) * 2.0 - 1.0 - one)
    model.save_pretrained(folder)
    path = folder / "config.json"  # transformers has saved its own name for the class.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    return folder
