# SPDX-License-Identifier: Apache-2.0
"""One training run from its config: on this process, or as one of several that were started
by torchrun, ``accelerate launch`` or Ray Train."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_layerskip.errors import UserError
from vllm_layerskip.training.config import TrainConfig, check_keys
from vllm_layerskip.training.data import Collator, load_samples
from vllm_layerskip.training.model import (
    add_lora,
    check_model,
    load_config,
    load_model,
    load_tokenizer,
)
from vllm_layerskip.training.output import layerskip_block, output_dtype, write_checkpoint
from vllm_layerskip.training.resume import check_folders, run_facts, start_run
from vllm_layerskip.training.trainer import LayerSkipTrainer, check_arguments


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, num_workers: int = 1
) -> Path:
    """Train, and write the checkpoint.

    Args:
        resume: go on with the last checkpoint of the run folder, if there is one.
        overwrite: replace the output and run folders of an earlier run.
        num_workers: processes of Ray Train; 1: this process.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: a key has a wrong value, or data or model cannot be used.
    """
    config = config.with_absolute_paths()
    if num_workers > 1:
        from vllm_layerskip.training.ray_train import train_with_ray

        return train_with_ray(config, num_workers, resume=resume, overwrite=overwrite)
    return train_here(config, resume=resume, overwrite=overwrite)


def train_here(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    prepare: Callable[[LayerSkipTrainer], Any] = lambda trainer: trainer,
) -> Path:
    """``train`` as one of the processes that the environment says there are.

    Args:
        prepare: has the last word on the trainer before it starts.
    """
    args, tokenizer, model_config = _checked(config)
    run_folder = config.output.resolved_run_folder
    # One process encodes the data and prepares the folder; the others then find both.
    with args.main_process_first(desc="data and run folder"):
        if args.process_index == 0:
            check_folders(config, resume, overwrite)
        train_data, eval_data = _load_data(config, tokenizer)
        if args.process_index == 0:
            start_run(run_folder, run_facts(config, args, args.world_size), resume)
    checkpoint = get_last_checkpoint(run_folder) if resume else None
    transformers.set_seed(args.seed)  # For new weights, adapters' too.
    model = load_model(config.model, model_config)
    model.config.layerskip = layerskip_block(
        config.recipe, config.output.exit_layer, config.output.num_speculative_tokens
    )
    generation_config = model.generation_config
    if config.lora is not None:
        model = add_lora(model, config.lora)
    pad = tokenizer.pad_token_id
    trainer = LayerSkipTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(tokenizer.eos_token_id if pad is None else pad),
        processing_class=tokenizer,
        recipe=config.recipe,
    )
    prepare(trainer)
    if trainer.is_world_process_zero():
        print(_summary(config, trainer, len(train_data), checkpoint), flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        write_checkpoint(
            config.output.folder,
            trainer.causal_lm.config,
            state_dict,
            output_dtype(config.output, model_config, config.model.path is None),
            tokenizer,
            generation_config,
            config.lora,
        )
        print(f"Wrote {config.output.folder}.", flush=True)
    trainer.accelerator.wait_for_everyone()
    return config.output.folder


def check_run(config: TrainConfig, *, num_ranks: int, resume: bool, overwrite: bool) -> None:
    """Refuse what would make ``num_ranks`` processes fail that are to call ``train_here``, encode
    the data for them, and make the run folder ready.

    Raises:
        UserError: as ``train``.
    """
    args, tokenizer, _ = _checked(config)
    check_folders(config, resume, overwrite)
    _load_data(config, tokenizer)
    run_folder = config.output.resolved_run_folder
    start_run(run_folder, run_facts(config, args, num_ranks), resume)


def _checked(
    config: TrainConfig,
) -> tuple[TrainingArguments, PreTrainedTokenizerBase, PretrainedConfig]:
    args = make_arguments(config)
    tokenizer = load_tokenizer(config.model)
    model_config = load_config(config.model, tokenizer)
    check_model(model_config, config.recipe, config.output, tokenizer, config.data.seq_len)
    return args, tokenizer, model_config


def _load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    data = config.data
    train_data = load_samples(data.train, data, tokenizer, "data.train")
    if data.eval is None:
        return train_data, None
    return train_data, load_samples(data.eval, data, tokenizer, "data.eval")


def make_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments out of the section ``training``, with this tool's defaults.

    Raises:
        UserError: a key is none of TrainingArguments, or has a wrong value.
    """
    hints = typing.get_type_hints(TrainingArguments)
    names = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    check_keys(config.training, names, "training")
    given = {
        name: _number(value, hints[name], f"training.{name}")
        for name, value in config.training.items()
    }
    defaults: dict[str, Any] = {
        "output_dir": str(config.output.resolved_run_folder),
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": "tensorboard",
        "eval_strategy": "steps" if config.data.eval else "no",
        "prediction_loss_only": True,
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
    }
    try:
        args = TrainingArguments(**defaults | given)
        check_arguments(args)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training: {error}") from None
    if args.fsdp and args.device.type == "cpu":
        raise UserError(
            "training.fsdp needs GPUs: on a CPU accelerate would ignore it. Leave it out."
        )
    if args.eval_strategy != "no" and config.data.eval is None:
        raise UserError(
            f"training.eval_strategy={str(args.eval_strategy)!r} needs data.eval. Name texts to "
            "evaluate on, or leave eval_strategy out."
        )
    return args


def _number(value: Any, hint: Any, key: str) -> Any:
    """YAML 1.1 reads 3e-4 as text."""
    types = typing.get_args(hint) or (hint,)
    if not isinstance(value, str) or str in types or not {int, float} & set(types):
        return value
    try:
        return float(value) if float in types else int(value)
    except ValueError:
        raise UserError(f"{key}={value!r} must be a number.") from None


def _summary(
    config: TrainConfig, trainer: LayerSkipTrainer, num_samples: int, checkpoint: str | None
) -> str:
    args, recipe = trainer.args, config.recipe
    curriculum = (
        f"rotational, R = {recipe.rotation}" if recipe.curriculum == "rotational" else "gradual"
    )
    start = f"resuming from {checkpoint}" if checkpoint else "starting"
    return (
        f"LayerSkip training of {type(trainer.causal_lm).__name__}, {trainer.num_layers} layers: "
        f"p_max {recipe.max_layer_dropout}, e_scale {recipe.exit_loss_scale}, {curriculum}; "
        f"{num_samples} samples of up to {config.data.seq_len} tokens, "
        f"{args.train_batch_size * args.gradient_accumulation_steps * args.world_size} a step on "
        f"{args.world_size} process(es); {start}."
    )
