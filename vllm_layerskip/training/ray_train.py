# SPDX-License-Identifier: Apache-2.0
"""The same run on the workers of Ray Train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vllm_layerskip.commands import UserError
from vllm_layerskip.training.config import Source, TrainConfig
from vllm_layerskip.training.run import check_run


def train_with_ray(
    config: TrainConfig, num_workers: int, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """``train`` on ``num_workers`` workers, each with a GPU where the cluster has them.

    Joins the Ray cluster that there is, or starts one on this machine. All workers read and
    write the config's paths, so several machines need a shared file system.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: as ``train``; or Ray is not installed.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UserError(
            f"--num-workers {num_workers}: {error}. Install the extra: "
            "pip install 'vllm-layerskip[train,ray]'"
        ) from None
    config = with_absolute_paths(config)
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
        run_config=RunConfig(name="ray", storage_path=str(config.output.resolved_run_folder)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        mistake = _user_error(error)
        if mistake is None:
            raise
        raise mistake from None
    return config.output.folder


def _train_on_worker(arguments: dict[str, Any]) -> None:
    from ray.train.huggingface.transformers import prepare_trainer

    from vllm_layerskip.training.run import train_here
    from vllm_layerskip.training.trainer import LayerSkipTrainer

    def prepare(trainer: LayerSkipTrainer) -> None:
        trainer.add_callback(_Report())
        prepare_trainer(trainer)

    # The driver made the folders ready, so a worker that Ray started again goes on.
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


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers have other working directories; names on the model hub stay names."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and Path(path).exists() else path

    def source(source: Source) -> Source:
        files = tuple(str(Path(file).resolve()) for file in source.files)
        return dataclasses.replace(source, files=files, dataset=absolute(source.dataset))

    model, data, output = config.model, config.data, config.output
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model, path=absolute(model.path), tokenizer=absolute(model.tokenizer)
        ),
        data=dataclasses.replace(
            data, train=source(data.train), eval=data.eval and source(data.eval)
        ),
        output=dataclasses.replace(
            output,
            folder=output.folder.resolve(),
            run_folder=output.resolved_run_folder.resolve(),
        ),
    )


def _user_error(error: BaseException) -> UserError | None:
    """The user's mistake behind a failed run, wherever Ray put it."""
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if isinstance(current, UserError) or current is None:
            if current is not None:
                return current
            continue
        pending += [current.__cause__, getattr(current, "cause", None)]
        failures = getattr(current, "worker_failures", None) or {}
        pending += [f for f in failures.values() if isinstance(f, BaseException)]
    return None
