# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that exist whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from vllm_layerskip.files.whole import UNFINISHED, replace_folder


class AtomicSaves(Trainer):
    """A Trainer whose ``checkpoint-N`` appears under its name when all of it is written."""

    _run_dir: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final_dir = Path(super()._get_output_dir(trial))
        unfinished_dir = final_dir / UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = str(unfinished_dir)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (final_dir / f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(final_dir / f"checkpoint-{best}")
        if self.args.should_save:
            # Again: the state that was just saved names the unfinished folder as the best one.
            self.state.save_to_json(str(unfinished_dir / name / TRAINER_STATE_NAME))
            replace_folder(unfinished_dir / name, final_dir / name)
            unfinished_dir.rmdir()
            rotate_checkpoints(
                output_dir=str(final_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
