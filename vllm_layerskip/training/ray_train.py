# SPDX-License-Identifier: Apache-2.0
"""A training run on the workers of Ray Train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vllm_layerskip.errors import UserError
from vllm_layerskip.training.atomic_saves import AtomicSaves
from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.rank import check_run, train_here


def train_with_ray(
    config: TrainConfig, num_workers: int, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Train on ``num_workers`` workers, each with a GPU where the cluster has enough.

    Joins the Ray cluster that there is, or starts one on this machine. All workers read and
    write the config's paths, so several machines need a shared file system.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: as ``train_here``; or Ray is not installed.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UserError(
            f"--num-workers {num_workers}: {error}. Install the extra: "
            "pip install 'vllm-layerskip[train,ray]'"
        ) from None
    check_run(config, num_ranks=num_workers, resume=resume, overwrite=overwrite)
    if not ray.is_initialized():
        ray.init(log_to_driver=True, include_dashboard=False)
    use_gpu = not config.training.get("use_cpu") and (
        ray.cluster_resources().get("GPU", 0) >= num_workers
    )
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"config": config.to_dict()},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        # A new name each time: we resume runs, Ray does not.
        run_config=RunConfig(
            name=f"ray-{time.time_ns()}", storage_path=str(config.output.resolved_run_folder)
        ),
    )
    trainer.fit()
    return config.output.folder


def _train_on_worker(arguments: dict[str, Any]) -> None:
    from ray.train.huggingface.transformers import prepare_trainer

    def prepare(trainer: AtomicSaves) -> None:
        trainer.add_callback(_Report())
        prepare_trainer(trainer)

    # The driver made the folders ready, so a worker that Ray restarts resumes the run.
    train_here(
        TrainConfig.from_dict(arguments["config"]), resume=True, overwrite=True, prepare=prepare
    )


class _Report(TrainerCallback):
    """Logged numbers as Ray Train's metrics; checkpoints stay in the run folder."""

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: Any = None, **_kwargs: Any
    ) -> None:
        import ray.train

        ray.train.report({**(logs or {}), "step": state.global_step})
