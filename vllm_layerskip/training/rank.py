# SPDX-License-Identifier: Apache-2.0
"""One training run as one of its processes: the only one, or a rank that torchrun,
``accelerate launch`` or Ray Train started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_layerskip.errors import UserError, one_line
from vllm_layerskip.training.arguments import make_arguments
from vllm_layerskip.training.atomic_saves import AtomicSaves
from vllm_layerskip.training.config import AnyRecipe, TrainConfig
from vllm_layerskip.training.data import Collator, load_samples
from vllm_layerskip.training.drafts.lora import check_draft_model
from vllm_layerskip.training.drafts.recipe import DraftRecipe
from vllm_layerskip.training.drafts.run import describe, make_draft_trainer, write_draft
from vllm_layerskip.training.drafts.scores import hold_out
from vllm_layerskip.training.drafts.trainer import DraftTrainer
from vllm_layerskip.training.model import (
    add_lora,
    check_model,
    load_config,
    load_model,
    load_tokenizer,
)
from vllm_layerskip.training.output import layerskip_block, output_dtype, write_checkpoint
from vllm_layerskip.training.resume import check_folders, run_facts, start_run
from vllm_layerskip.training.trainer import LayerSkipTrainer


def train_here(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    prepare: Callable[[AtomicSaves], Any] = lambda trainer: trainer,
) -> Path:
    """Train in this process, beside the other ranks that the environment says there are.

    Args:
        resume, overwrite: see ``run.train``.
        prepare: has the last word on the trainer before it starts.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: a key has a wrong value, or data or model cannot be used.
    """
    checked = _check(config)
    args = checked.args
    # One process encodes the data and prepares the folder; the others then find both.
    with args.main_process_first(desc="data and run folder"):
        if args.process_index == 0:
            check_folders(config, resume, overwrite)
        train_data, eval_data = checked.load_data()
        if args.process_index == 0:
            checked.start_run(args.world_size, resume)
    checkpoint = get_last_checkpoint(config.output.resolved_run_folder) if resume else None
    with _missing_packages_named():
        trainer = checked.make_trainer(train_data, eval_data)
    prepare(trainer)
    if trainer.is_world_process_zero():
        print(_summary(config, trainer, len(train_data), checkpoint), flush=True)
    if checkpoint is None and isinstance(trainer, DraftTrainer):
        begun = trainer.begin()
        if begun and trainer.is_world_process_zero():
            print(begun, flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    checked.write_checkpoint(trainer)
    return config.output.folder


@contextmanager
def _missing_packages_named() -> Iterator[None]:
    """Report a package that transformers needs for a key of the config and does not find.

    Raises:
        UserError: it has transformers' words, which name the package.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("vllm_layerskip"):
            raise
        raise UserError(one_line(error)) from None


def check_run(config: TrainConfig, *, num_ranks: int, resume: bool, overwrite: bool) -> None:
    """Prepare for ``num_ranks`` processes that are to call ``train_here``: refuse what would make
    them fail, encode the data, and make the run folder ready.

    Raises:
        UserError: as ``train_here``.
    """
    checked = _check(config)
    check_folders(config, resume, overwrite)
    checked.load_data()
    checked.start_run(num_ranks, resume)


@dataclass(frozen=True)
class _CheckedRun:
    """A config whose model, tokenizer and arguments fit together; no weight is read yet."""

    config: TrainConfig
    args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig

    def load_data(self) -> tuple[Dataset, Dataset | None]:
        """Samples to train and, if there are any, to evaluate or score on."""
        data = self.config.data
        train_data = load_samples(data.train, data, self.tokenizer, "data.train")
        if data.eval is None and isinstance(self.config.recipe, DraftRecipe):
            return hold_out(train_data, "data.train")
        if data.eval is None:
            return train_data, None
        return train_data, load_samples(data.eval, data, self.tokenizer, "data.eval")

    def start_run(self, num_ranks: int, resume: bool) -> None:
        facts = run_facts(self.config, self.args, num_ranks)
        start_run(self.config.output.resolved_run_folder, facts, resume)

    def make_trainer(
        self, train_data: Dataset, eval_data: Dataset | None
    ) -> LayerSkipTrainer | DraftTrainer:
        """The trainer with the model and its weights."""
        config, tokenizer = self.config, self.tokenizer
        transformers.set_seed(self.args.seed)  # For new weights, adapters' too.
        model = load_model(config.model, self.model_config)
        pad = tokenizer.pad_token_id
        arguments = {
            "args": self.args,
            "train_dataset": train_data,
            "eval_dataset": eval_data,
            "data_collator": Collator(tokenizer.eos_token_id if pad is None else pad),
            "processing_class": tokenizer,
        }
        if isinstance(config.recipe, DraftRecipe):
            return make_draft_trainer(config, config.recipe, model, **arguments)
        model.config.layerskip = layerskip_block(
            config.recipe, config.output.exit_layer, config.output.num_speculative_tokens
        )
        if config.lora is not None:
            model = add_lora(model, config.lora)
        return LayerSkipTrainer(model=model, recipe=config.recipe, **arguments)

    def write_checkpoint(self, trainer: LayerSkipTrainer | DraftTrainer) -> None:
        """Write what was trained, on rank 0; all ranks must call this and return together."""
        config = self.config
        if isinstance(trainer, DraftTrainer):
            write_draft(config, trainer)
            return
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            write_checkpoint(
                config.output.folder,
                trainer.causal_lm.config,
                state_dict,
                output_dtype(config.output, self.model_config, config.model.path is None),
                self.tokenizer,
                trainer.causal_lm.generation_config,
                config.lora,
            )
            print(f"Wrote {config.output.folder}.", flush=True)
        trainer.accelerator.wait_for_everyone()


def _check(config: TrainConfig) -> _CheckedRun:
    args = make_arguments(config)
    tokenizer = load_tokenizer(config.model)
    model_config = load_config(config.model, tokenizer)
    check_model(
        model_config,
        config.recipe,
        config.output,
        tokenizer,
        config.data.seq_len,
        config.model.path is None,
    )
    if isinstance(config.recipe, DraftRecipe):
        check_draft_model(model_config, config.recipe, config.lora)
    return _CheckedRun(config, args, tokenizer, model_config)


def _summary(
    config: TrainConfig,
    trainer: LayerSkipTrainer | DraftTrainer,
    num_samples: int,
    checkpoint: str | None,
) -> str:
    args = trainer.args
    start = f"resuming from {checkpoint}" if checkpoint else "starting"
    return (
        f"LayerSkip training of {type(trainer.causal_lm).__name__}, {trainer.num_layers} layers: "
        f"{_described(config.recipe)}; "
        f"{num_samples} samples of up to {config.data.seq_len} tokens, "
        f"{args.train_batch_size * args.gradient_accumulation_steps * args.world_size} a step on "
        f"{args.world_size} process(es); {start}."
    )


def _described(recipe: AnyRecipe) -> str:
    if isinstance(recipe, DraftRecipe):
        return describe(recipe)
    curriculum = (
        f"rotational, R = {recipe.rotation}" if recipe.curriculum == "rotational" else "gradual"
    )
    return f"p_max {recipe.max_layer_dropout}, e_scale {recipe.exit_loss_scale}, {curriculum}"
