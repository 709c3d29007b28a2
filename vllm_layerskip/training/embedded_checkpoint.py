# SPDX-License-Identifier: Apache-2.0
"""Train and score the embedded checkpoint: a small Llama on the standard library's sources.

``vllm-layerskip train`` cannot make it: its tokenizer is trained too, each module begins with
``<s>``, and a twin without the recipe is scored beside it.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from vllm_layerskip.evaluation.checkpoints import load_model
from vllm_layerskip.evaluation.data import Document, encode
from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement
from vllm_layerskip.evaluation.scores import score_exits
from vllm_layerskip.files.corpus import Corpus, held_out_prompts, load_stdlib
from vllm_layerskip.files.whole import write_json, write_text
from vllm_layerskip.training.card import model_card
from vllm_layerskip.training.output import layerskip_block, write_checkpoint
from vllm_layerskip.training.recipe import Recipe
from vllm_layerskip.training.tokenizer import train_tokenizer
from vllm_layerskip.training.trainer import LayerSkipTrainer

SCORED_K = (1, 3, 5, 7)
"""Numbers of drafts whose acceptance length is scored."""


@dataclass(frozen=True)
class TrainingPlan:
    """Model shape, optimisation and recipe of one run; the defaults make the checkpoint."""

    vocab_size: int = 1024
    hidden_size: int = 160
    intermediate_size: int = 384
    num_layers: int = 12
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    seq_len: int = 512
    batch_size: int = 4
    num_steps: int = 2400
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    seed: int = 42
    bf16: bool = field(default_factory=lambda: _has_fast_bf16())
    exit_layer: int = 3
    num_speculative_tokens: int = 5
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            max_layer_dropout=0.2, exit_loss_scale=1.0, exit_loss_profile="uniform", rotation=3
        )
    )

    def twin(self) -> TrainingPlan:
        """This plan without the recipe."""
        return replace(self, recipe=Recipe.off())


class Blocks(Dataset):
    """Blocks of ``seq_len`` token ids; the ragged end is dropped."""

    def __init__(self, token_ids: Sequence[int], seq_len: int) -> None:
        num_blocks = len(token_ids) // seq_len
        self.blocks = torch.tensor(token_ids[: num_blocks * seq_len]).view(num_blocks, seq_len)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def _has_fast_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported()


def train_model(
    plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, output: Path
) -> tuple[LlamaForCausalLM, float]:
    """Train one model; returns it (float32, on the CPU) and the seconds that its steps took."""
    blocks = encode_blocks(plan, tokenizer, corpus.train)
    trainer = make_trainer(plan, tokenizer, blocks, output)
    start = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - start
    return trainer.model.cpu(), seconds


def encode_blocks(
    plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]
) -> Blocks:
    """Texts, each between ``<s>`` and ``</s>``, as training samples of ``seq_len`` token ids."""
    documents = (Document(name, texts[name]) for name in sorted(texts))
    return Blocks(encode(tokenizer, documents, "document").token_ids, plan.seq_len)


def make_trainer(
    plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast, blocks: Dataset, output: Path
) -> LayerSkipTrainer:
    """A freshly initialised model of the plan's shape and its trainer."""
    transformers.set_seed(plan.seed)
    return LayerSkipTrainer(
        model=LlamaForCausalLM(_model_config(plan, tokenizer)),
        args=_arguments(plan, output),
        train_dataset=blocks,
        recipe=plan.recipe,
    )


def _model_config(plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_heads,
        num_key_value_heads=plan.num_kv_heads,
        head_dim=plan.head_dim,
        max_position_embeddings=plan.seq_len,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _arguments(plan: TrainingPlan, output: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        max_steps=plan.num_steps,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        adam_beta2=0.95,
        bf16=plan.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=plan.seed,
        logging_steps=50,
        save_strategy="no",
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def score_model(
    plan: TrainingPlan,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    num_prompts: int = 48,
    prompt_len: int = 128,
    num_new_tokens: int = 192,
    num_windows: int | None = None,
) -> dict[str, object]:
    """Exit scores and acceptance lengths on held-out modules.

    Args:
        num_windows: how many windows of ``seq_len`` tokens the exits are scored on; default: all.
    """
    windows = encode_blocks(plan, tokenizer, corpus.held_out).blocks[:num_windows]
    texts = [text for _, text in held_out_prompts(corpus, 4 * num_prompts, num_lines=40)]
    encoded = [[tokenizer.bos_token_id, *ids][:prompt_len] for ids in tokenizer(texts)["input_ids"]]
    prompts = [ids for ids in encoded if len(ids) == prompt_len][:num_prompts]
    return {
        "exits": [score.to_dict() for score in score_exits(model, windows)],
        "num_prompts": len(prompts),
        "prompt_len": prompt_len,
        "num_new_tokens": num_new_tokens,
        "acceptance_length": _acceptance_lengths(model, prompts, num_new_tokens),
    }


def _acceptance_lengths(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], num_new_tokens: int
) -> dict[str, dict[str, float]]:
    """By exit layer E and number of drafts K, on greedy continuations that no stop token ends.

    Raises:
        ValueError: the continuations are too short for one whole step of the largest K.
    """
    if num_new_tokens < max(SCORED_K) + 2:
        raise ValueError(
            f"{num_new_tokens} continuation tokens are too few for one step of {max(SCORED_K)} "
            "drafts. Continue the prompts for longer."
        )
    continuations = generate_greedily(model, prompts, num_new_tokens, stop_token_ids=())
    exit_layers = range(1, model.config.num_hidden_layers)
    agreement = measure_agreement(model, prompts, continuations, exit_layers)
    by_exit = agreement.acceptance_lengths(max(SCORED_K)).tolist()
    return {
        f"E={exit_layer}": {f"K={k}": round(lengths[k - 1], 3) for k in SCORED_K}
        for exit_layer, lengths in zip(exit_layers, by_exit, strict=True)
    }


def run(plan: TrainingPlan, output: Path, with_twin: bool, keep_checkpoint: bool) -> None:
    """Train, save and score the checkpoint in ``output``; scores go to ``scores.json``.

    Args:
        with_twin: also train and score the twin; its weights are not kept.
        keep_checkpoint: score the checkpoint that is in ``output`` instead of training it.
    """
    corpus = load_stdlib()
    tokenizer = train_tokenizer(corpus.train.values(), plan.vocab_size, plan.seq_len)
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Any]
    if keep_checkpoint:
        scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    else:
        scores = {"layerskip": _train_into(plan, tokenizer, corpus, output)}
    scores |= {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "corpus_sha256": corpus.digest,
        "plan": asdict(plan),
    }
    # What is scored is what is stored: bfloat16 weights, read back.
    scores["layerskip"] |= score_model(plan, load_checkpoint(output), tokenizer, corpus)
    _write_scores(output, scores)
    if with_twin:
        with tempfile.TemporaryDirectory() as folder:
            cost = _train_into(plan.twin(), tokenizer, corpus, Path(folder))
            twin = load_checkpoint(Path(folder))
        scores["twin"] = cost | score_model(plan, twin, tokenizer, corpus)
        _write_scores(output, scores)


def _train_into(
    plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, output: Path
) -> dict[str, float]:
    """Train and save; returns seconds and threads."""
    model, seconds = train_model(plan, tokenizer, corpus, output)
    save_checkpoint(plan, model, tokenizer, output)
    return {"seconds": round(seconds, 1), "num_threads": torch.get_num_threads()}


def load_checkpoint(folder: Path) -> LlamaForCausalLM:
    """The stored checkpoint in float32, for scoring."""
    return load_model(str(folder), "--output")


def save_checkpoint(
    plan: TrainingPlan,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
) -> None:
    """bfloat16 weights, tokenizer, and the block that ``exit_layer="auto"`` reads."""
    model.config.layerskip = layerskip_block(
        plan.recipe, plan.exit_layer, plan.num_speculative_tokens
    )
    write_checkpoint(
        output,
        model.config,
        model.state_dict(),
        torch.bfloat16,
        tokenizer,
        model.generation_config,
    )


def _write_scores(output: Path, scores: dict[str, Any]) -> None:
    write_json(output / "scores.json", scores, indent=2)
    write_text(output / "README.md", model_card(scores))
