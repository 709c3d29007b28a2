# SPDX-License-Identifier: Apache-2.0
"""The settings of a run, kept in its folder: it can only be resumed with the same ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import write_json
from vllm_layerskip.training.config import TrainConfig

RUN_FILE = "run.json"
_SCHEDULE = ("seed", "data_seed", "max_steps", "num_train_epochs", "learning_rate")


def run_facts(config: TrainConfig, args: TrainingArguments, num_ranks: int) -> dict[str, Any]:
    """Everything that determines the steps of a run, by key.

    A resumed run may have another number of ranks, but not another number of samples per step.
    """
    plain = config.to_dict()
    facts: dict[str, Any] = {}
    for section in ("model", "data", "recipe", "lora"):
        facts |= _flat(plain[section], section)
    facts |= {f"training.{name}": getattr(args, name) for name in _SCHEDULE}
    per_rank = args.per_device_train_batch_size * args.gradient_accumulation_steps
    facts["samples per step"] = per_rank * num_ranks
    return facts


def _flat(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {key: value}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= _flat(part, f"{key}.{name}")
    return flat


def check_folders(config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Refuse to overwrite a checkpoint or an earlier run.

    Raises:
        UserError: it names the folder and what to do.
    """
    folder, run_folder = config.output.folder, config.output.resolved_run_folder
    if overwrite:
        return
    if folder.exists():
        raise UserError(
            f"output.folder: {folder} exists. Give another name, or pass --overwrite to replace it."
        )
    if not resume and run_folder.exists() and get_last_checkpoint(run_folder):
        raise UserError(
            f"output.run_folder: {run_folder} holds checkpoints of an earlier run. Pass --resume "
            "to go on with it, --overwrite to start anew, or give another folder."
        )


def start_run(run_folder: Path, facts: Mapping[str, Any], resume: bool) -> None:
    """Prepare the run folder, in one process; unless it is resumed, an earlier run is deleted.

    Raises:
        UserError: the folder's run had other settings, or the folder holds something else.
    """
    run_file = run_folder / RUN_FILE
    if resume and run_file.is_file():
        if get_last_checkpoint(run_folder):
            _check_same(json.loads(run_file.read_text(encoding="utf-8")), facts, run_folder)
            return
    elif run_folder.exists():
        if any(run_folder.iterdir()) and not run_file.is_file():
            raise UserError(
                f"output.run_folder: {run_folder} holds files that are not of a training run. Give "
                "the name of a new folder."
            )
        shutil.rmtree(run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    write_json(run_file, facts)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], run_folder: Path) -> None:
    now = json.loads(json.dumps(now))
    different = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if different:
        raise UserError(
            f"--resume: the run in {run_folder} was started with other settings: "
            f"{'; '.join(different)}. Set them back to resume it, or start anew with --overwrite "
            "or another output.run_folder."
        )
