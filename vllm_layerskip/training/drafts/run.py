# SPDX-License-Identifier: Apache-2.0
"""A run of ``vllm-layerskip train`` whose model stays frozen: its trainer, and what it writes."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.drafts.lora import add_draft_lora, read_tokens
from vllm_layerskip.training.drafts.output import base_digest, record, write_adapter
from vllm_layerskip.training.drafts.recipe import DraftRecipe
from vllm_layerskip.training.drafts.scores import score
from vllm_layerskip.training.drafts.trainer import DraftTrainer


def make_draft_trainer(
    config: TrainConfig, recipe: DraftRecipe, model: nn.Module, **arguments: Any
) -> DraftTrainer:
    """The trainer of a draft adapter.

    Args:
        model: the frozen model with its weights.
        arguments: of ``Trainer``; ``eval_dataset`` is what the adapter is scored on.

    Raises:
        UserError: the weights' files cannot be read, or adapters do not fit the model.
    """
    digest = base_digest(config.model)
    adapted = add_draft_lora(model, recipe, config.lora)
    token_ids = read_tokens(recipe, model.config.vocab_size)
    trainer = DraftTrainer(model=adapted, recipe=recipe, draft_vocab=token_ids, **arguments)
    trainer.base_digest = digest
    return trainer


def write_draft(config: TrainConfig, trainer: DraftTrainer) -> None:
    """Score the adapter and write it, on rank 0; all ranks must call this and return together."""
    scores = score(trainer, trainer.eval_dataset)
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        content = record(config.model, trainer.recipe, trainer.base_digest, scores)
        write_adapter(config.output, trainer.model, state_dict, content, trainer.draft_vocab)
        print(f"Wrote {config.output.folder}: {_in_words(scores)}.", flush=True)
        if trainer.memory is not None:
            trainer.memory.forget()
    trainer.accelerator.wait_for_everyone()


def describe(recipe: DraftRecipe) -> str:
    """For the line that a run starts with."""
    learnt = {"kl": "KL", "argmax": "argmax", "both": "KL and argmax"}[recipe.distill]
    norm = " and a final norm" if recipe.final_norm or recipe.exit_translator else ""
    translator = " with an exit translator" if recipe.exit_translator else ""
    return (
        f"frozen, adapters on layers 0..{recipe.exit_layer - 1}{norm}{translator} learn the last "
        f"layer's {learnt} for {recipe.num_speculative_tokens} drafts a step"
    )


def _in_words(scores: dict[str, Any]) -> str:
    before, after = scores["before"], scores["after"]
    return (
        f"agreement with the last layer {before['agreement']:.1%} to {after['agreement']:.1%}, "
        f"predicted acceptance length at K = {scores['num_speculative_tokens']} "
        f"{before['acceptance_length']:.2f} to {after['acceptance_length']:.2f}, on "
        f"{scores['num_tokens']} held-out tokens"
    )
