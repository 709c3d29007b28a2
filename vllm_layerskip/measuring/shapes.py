# SPDX-License-Identifier: Apache-2.0
"""Sizes of Llama models, to run them without their weights.

A shape becomes a folder with a ``config.json``; vLLM fills it with dummy weights
(``load_format="dummy"``). ``benchmarks/engines/presets.py`` has published acceptance for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense Llama, as its ``config.json`` names them."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """The shape of a checkpoint's ``config.json``."""
        num_heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            vocab_size=config["vocab_size"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices; its two norms (under 0.01 %) are left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_weights(self) -> int:
        """Weights of the LM head: read at every step, also where it shares the embedding."""
        return self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        """All weights in memory."""
        num_vocab_matrices = 1 if self.tie_word_embeddings else 2
        return self.num_layers * self.layer_weights + num_vocab_matrices * self.head_weights

    @property
    def kv_values_per_layer(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim

    def first_layers(self, num_layers: int) -> Shape:
        """The shape cut after ``num_layers`` layers, with the same embedding and head."""
        return replace(self, num_layers=num_layers)

    def write_config(self, folder: Path, max_model_len: int) -> Path:
        """Make ``folder`` a model folder that holds a config only."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": max_model_len,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        return folder


SHAPES: dict[str, Shape] = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 128, 32000),
    "llama-2-70b": Shape(8192, 28672, 80, 64, 8, 128, 32000),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, tie_word_embeddings=True),
    "tiny": Shape(64, 128, 8, 2, 2, 32, 2048),
}
"""Sizes as the models' own ``config.json`` has them; ``tiny`` is for rehearsals."""
