# SPDX-License-Identifier: Apache-2.0
"""Train a draft adapter within a time limit, and pack it into one file.

    python -m benchmarks.gpu.draft_adapter --model MODEL --chats chats.jsonl --time-limit 200 \\
        --output FOLDER --archive adapter.tar.gz --facts train.json

It is ``vllm-layerskip train`` with ``real_model.yaml``, with two differences. It stops at the time
limit, and the learning rate follows the clock: up over the first steps, then down along a cosine,
which ends with the time. So a machine of any speed uses all of its time and ends a whole schedule.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser, mistakes_reported, positive_int
from benchmarks.engines.results import write_result
from vllm_layerskip.example_model.pinned import ORIGIN
from vllm_layerskip.training.config import TrainConfig

CONFIG = Path(__file__).with_name("real_model.yaml")
RESERVE_S = 20.0
"""For scores, which cost some passes over at most 64 samples, and for writing."""
WARMUP_STEPS = 20
RECORD = "layerskip_adapter.json"
TINY = {"seq_len": 128, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
        "logging_steps": 1, "use_cpu": True}  # fmt: skip


class Clock:
    """The factor of the learning rate by the time that is left."""

    def __init__(self, deadline: float) -> None:
        self.start, self.deadline = time.monotonic(), deadline

    def __call__(self, step: int) -> float:
        share = (time.monotonic() - self.start) / max(self.deadline - self.start, 1e-9)
        cosine = (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2
        return min((step + 1) / WARMUP_STEPS, 1.0) * cosine


def config_of(args: argparse.Namespace) -> TrainConfig:
    """``real_model.yaml`` with the places and sizes of the command line."""
    config = TrainConfig.from_yaml(CONFIG)
    data, training = config.data, dict(config.training)
    if args.tiny:
        tiny = dict(TINY)
        data = dataclasses.replace(data, seq_len=tiny.pop("seq_len"))
        training |= tiny
    if args.max_steps is not None:
        training["max_steps"] = args.max_steps
    source = dataclasses.replace(data.train, files=(str(args.chats),))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(args.model)),
        data=dataclasses.replace(data, train=source),
        training=training,
        output=dataclasses.replace(config.output, folder=args.output),
    ).with_absolute_paths()


def in_time(deadline: float, kept: list[Any]) -> Callable[[Any], Any]:
    """What has the last word on the trainer: its learning rate and its end.

    Args:
        kept: gets the trainer.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerCallback

    class Deadline(TrainerCallback):
        def on_step_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
            if time.monotonic() > deadline:
                control.should_training_stop = True

    def prepare(trainer: Any) -> Any:
        def create_scheduler(_num_steps: int = 0, optimizer: Any = None, **_kwargs: Any) -> Any:
            trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, Clock(deadline))
            return trainer.lr_scheduler

        trainer.create_scheduler = create_scheduler
        trainer.add_callback(Deadline())
        kept.append(trainer)
        return trainer

    return prepare


def name_base(folder: Path, place: str) -> None:
    """Write the model's name where an adapter names its folder on this machine."""
    for name in ("README.md", "adapter_config.json", RECORD):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(place, ORIGIN), encoding="utf-8")


def pack(folder: Path, archive: Path) -> None:
    """All files of an adapter in one, which appears whole."""
    unfinished = archive.with_name(f".{archive.name}")
    with tarfile.open(unfinished, "w:gz") as tar:
        tar.add(folder, folder.name)
    unfinished.replace(archive)


def train(args: argparse.Namespace, start: float) -> dict[str, Any]:
    """Train; what there is to tell of it."""
    from vllm_layerskip.measuring.provenance import provenance
    from vllm_layerskip.training.rank import train_here

    config = config_of(args)
    shutil.rmtree(config.output.folder, ignore_errors=True)
    trainers: list[Any] = []
    begin = time.monotonic()
    deadline = start + args.time_limit - RESERVE_S
    train_here(config, overwrite=True, prepare=in_time(deadline, trainers))
    (trainer,) = trainers
    steps = trainer.state.global_step
    sizes = (steps, trainer.args.per_device_train_batch_size, config.data.seq_len)
    return {
        "num_steps": steps,
        "num_samples": len(trainer.train_dataset),
        "num_trained_tokens": math.prod(sizes),
        "seconds": round(time.monotonic() - begin, 1),
        "config": config.to_dict(),
        "log": trainer.state.log_history,
        "provenance": provenance(),
    }


def main() -> None:
    start = time.monotonic()
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, required=True, metavar="S")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the adapter.")
    parser.add_argument("--archive", type=Path, required=True, help="Gets the same as one file.")
    parser.add_argument("--facts", type=Path, required=True, help="Result file.")
    parser.add_argument("--max-steps", type=positive_int)
    parser.add_argument("--tiny", action="store_true", help="Sizes of a rehearsal.")
    args = parser.parse_args()
    if args.facts.exists() and (args.output / RECORD).exists():
        print(f"{args.output} is trained already.")
        return
    with mistakes_reported(parser):
        facts = train(args, start)
    name_base(args.output, str(args.model.absolute()))
    pack(args.output, args.archive)
    facts["adapter"] = json.loads((args.output / RECORD).read_text(encoding="utf-8"))
    write_result(args.facts, facts)
    print(f"{facts['num_steps']} steps, {args.archive.stat().st_size / 1e6:.1f} MB packed, "
          f"{time.monotonic() - start:.0f} s in all")  # fmt: skip


if __name__ == "__main__":
    main()
