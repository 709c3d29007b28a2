# SPDX-License-Identifier: Apache-2.0
"""Tiny models of several families, a tokenizer of letters, and scores by definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
}


def random_llama(**settings: Any) -> LlamaForCausalLM:
    """A Llama of 4 layers; the same weights for the same settings."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | settings)).eval()


def save(config: Any, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def save_tokenizer(
    folder: Path,
    alphabet: str = "abcdefghij \n",
    bos: str | None = "<s>",
    eos: str | None = "</s>",
) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = [token for token in (bos, eos) if token]
    vocab = {token: index for index, token in enumerate([*specials, "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


@torch.no_grad()
def scores_by_definition(
    model: Any, windows: torch.Tensor, scored: torch.Tensor
) -> list[tuple[float, float, float]]:
    """Perplexity, accuracy and agreement of each exit, as a model without the layers above it;
    token by token."""
    layers = model.model.layers
    logits = []
    for num_layers in range(1, len(layers) + 1):
        model.model.layers = layers[:num_layers]
        logits.append(model(windows, use_cache=False).logits.double())
    model.model.layers = layers
    scores = []
    for exit_logits in logits:
        nll, correct, agreeing = [], [], []
        for row, column in scored.nonzero().tolist():
            if column == 0:
                continue
            at = row, column - 1
            token = int(windows[row, column])
            nll.append(-float(functional.log_softmax(exit_logits[at], -1)[token]))
            correct.append(int(exit_logits[at].argmax()) == token)
            agreeing.append(int(exit_logits[at].argmax()) == int(logits[-1][at].argmax()))
        count = len(nll)
        scores.append((math.exp(sum(nll) / count), sum(correct) / count, sum(agreeing) / count))
    return scores


def write_texts(folder: Path) -> Path:
    """A text file and a .jsonl file of two lines: three documents."""
    folder.mkdir()
    (folder / "a.txt").write_text("abc def ghij\n" * 20)
    (folder / "b.jsonl").write_text('{"text": "jihg fed cba"}\n"a b c d e f"\n')
    return folder
