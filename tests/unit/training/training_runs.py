# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint, texts and configs for runs of ``vllm-layerskip train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.tokenizer import train_tokenizer

NUM_LAYERS = 4
SEQ_LEN = 32
OFF = {"max_layer_dropout": 0.0, "exit_loss_scale": 0.0, "rotation": 1}
"""The recipe of plain training."""
TEXTS = [f"def add_{i}(left, right):\n    return left + right + {i}\n" * 3 for i in range(40)]


def small_tokenizer() -> Any:
    texts = ["def add(left, right):\n    return left + right\n", "import os\nimport sys\n"] * 20
    return train_tokenizer(texts, vocab_size=300, model_max_length=64)


def write_tokenizer(folder: Path) -> Any:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_checkpoint(folder: Path, initializer_range: float = 0.02) -> Path:
    """A 4-layer Llama of random weights with its tokenizer.

    With the default range its exits say much the same; with 0.2 every layer changes what is said.
    """
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def settings(folder: Path, checkpoint: Path, texts: Path, **sections: Any) -> dict[str, Any]:
    """A config's mapping; ``sections`` are merged into its sections, ``lora`` is set."""
    values: dict[str, Any] = {
        "model": {"path": str(checkpoint)},
        "data": {"train": {"files": [str(texts)]}, "seq_len": SEQ_LEN},
        "recipe": {"max_layer_dropout": 0.5, "exit_loss_scale": 1.0, "rotation": 2},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "report_to": "none",
        },
        "output": {
            "folder": str(folder / "model"),
            "exit_layer": 2,
            "num_speculative_tokens": 3,
            "dtype": "float32",
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def draft_settings(folder: Path, checkpoint: Path, texts: Path, **sections: Any) -> dict[str, Any]:
    """As ``settings``, of a run that trains an adapter for drafts."""
    values = settings(folder, checkpoint, texts)
    values["recipe"] = {"target": "frozen", "exit_layer": 2, "num_speculative_tokens": 3}
    values["output"] = {"folder": str(folder / "adapter")}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def config(*args: Any, **sections: Any) -> TrainConfig:
    return TrainConfig.from_dict(settings(*args, **sections))


def losses(run_folder: Path) -> list[float]:
    """Loss of each logged step."""
    state = json.loads((run_folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
