# SPDX-License-Identifier: Apache-2.0
"""transformers' TrainingArguments from the section ``training``."""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from vllm_layerskip.errors import UserError, one_line
from vllm_layerskip.training.config import TrainConfig, check_keys
from vllm_layerskip.training.trainer import check_arguments


def make_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments of the section ``training``, over this tool's defaults.

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
    try:
        args = TrainingArguments(**_defaults(config) | given)
        check_arguments(args)
        _check_reports(args)
        _check_optimizer(args)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training: {one_line(error)}") from None
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


def _check_reports(args: TrainingArguments) -> None:
    """See that what ``report_to`` names is installed; the trainer would ask after minutes.

    Raises:
        UserError: it is not.
    """
    for callback in get_reporting_integration_callbacks(args.report_to):
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"training.report_to={args.report_to!r}: {one_line(error).rstrip('.')}, or leave "
                "report_to out: tensorboard is the default."
            ) from None


def _check_optimizer(args: TrainingArguments) -> None:
    """See that the package of an optimizer is installed.

    Raises:
        UserError: it is not.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        # Some optimizers are only made with the model; that is no missing package.
        if "install" in str(error):
            raise UserError(f"training.optim={str(args.optim)!r}: {one_line(error)}") from None


def _defaults(config: TrainConfig) -> dict[str, Any]:
    return {
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


def _number(value: Any, hint: Any, key: str) -> Any:
    """The value, as a number if its argument is one: YAML 1.1 reads 3e-4 as text."""
    types = typing.get_args(hint) or (hint,)
    if not isinstance(value, str) or str in types or not {int, float} & set(types):
        return value
    try:
        return float(value) if float in types else int(value)
    except ValueError:
        raise UserError(f"{key}={value!r} must be a number.") from None
