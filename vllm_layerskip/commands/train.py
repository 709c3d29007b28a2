# SPDX-License-Identifier: Apache-2.0
"""Train a model with the LayerSkip recipe: layer dropout and the early-exit loss.

The YAML file says which model, data, recipe and output; docs/training.md explains its keys, and
examples/training has one for each setting of the paper. An interrupted run goes on with --resume
and loses at most the steps since its last save (training.save_steps).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_layerskip.errors import UserError, needs_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="A YAML file.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with the last checkpoint in the run folder; without one, start.",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Replace the output and run folders of an earlier run.",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=1,
        metavar="N",
        help="Processes of Ray Train, each with a GPU if there are GPUs. Default: 1, without Ray.",
    )


def run(args: argparse.Namespace) -> None:
    if args.num_workers < 1:
        raise UserError(f"--num-workers {args.num_workers} must be at least 1.")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other. Pass one of them.")
    with needs_extra("train"):
        from vllm_layerskip.training.config import TrainConfig

        config = TrainConfig.from_yaml(args.config)
        from vllm_layerskip.training.run import train
    try:
        train(config, resume=args.resume, overwrite=args.overwrite, num_workers=args.num_workers)
    except UserError as error:
        message = str(error)  # It names an option, or a key of the file.
        raise UserError(
            message if message.startswith("--") else f"--config {args.config}: {message}"
        ) from None
