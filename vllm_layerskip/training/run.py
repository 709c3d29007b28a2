# SPDX-License-Identifier: Apache-2.0
"""One training run from its config: in this process, or on the workers of Ray Train."""

from __future__ import annotations

from pathlib import Path

from vllm_layerskip.measuring.cluster import check_answers
from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.rank import train_here


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
        check_answers(None)
        from vllm_layerskip.training.ray_train import train_with_ray

        return train_with_ray(config, num_workers, resume=resume, overwrite=overwrite)
    return train_here(config, resume=resume, overwrite=overwrite)
