# SPDX-License-Identifier: Apache-2.0
"""Make chats out of nothing but a model: training data for its drafts, in its own words.

The model gets what its chat template writes before a user's first message, and goes on with a
question (arXiv 2406.08464); then it answers, greedily. Questions that do not end, are empty, repeat
an earlier one or are in a file of --exclude are dropped, and others are sampled until there are
--num-chats (at most 100 questions, and 10 for each chat so far). Answers that --max-answer-tokens
cut off are dropped, too.

A run that was interrupted, or that --max-minutes ended, goes on where it was: give the same command
again. With another --num-chats, --exclude or --keep-unfinished it keeps what the model wrote, and
adds what is missing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_layerskip.commands.arguments import add_dtype_and_device, checkpoint, engine_args
from vllm_layerskip.errors import needs_extra

if TYPE_CHECKING:
    from vllm_layerskip.batch.self_chats import SelfChatsSettings, Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=checkpoint, required=True,
        help="Folder or name of an instruction-tuned checkpoint.",
    )  # fmt: skip
    parser.add_argument(
        "--num-chats", type=_integer(1, 10**9), required=True, metavar="N", help="Chats to make."
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE",
        help="Gets the chats, a line each (.jsonl); FILE.run beside it all that the model wrote.",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="FILE",
        help="Files, folders or patterns of a test set: chats with its questions are left out.",
    )  # fmt: skip
    parser.add_argument(
        "--max-minutes", type=_number("above 0", lambda m: 0 < m < math.inf), metavar="M",
        help="Stop asking after so many minutes and keep what is there. Default: no limit.",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="Begin anew if there are some.")
    _add_sampling_arguments(parser)
    _add_engine_arguments(parser)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=_number("above 0, at most 2", lambda t: 0 < t <= 2), default=1.0,
        metavar="T", help="Of questions. Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--top-p", type=_number("above 0, at most 1", lambda p: 1e-9 <= p <= 1), default=1.0,
        metavar="P", help="Of questions. Default: 1.",
    )  # fmt: skip
    group.add_argument(
        "--max-question-tokens", type=_integer(1, 10**9), default=256, metavar="N",
        help="A longer question is dropped. Default: 256.",
    )  # fmt: skip
    group.add_argument(
        "--max-answer-tokens", type=_integer(1, 10**9), default=512, metavar="N",
        help="A longer answer is dropped. Default: 512.",
    )  # fmt: skip
    group.add_argument(
        "--keep-unfinished", action="store_true",
        help="Keep longer answers, cut off: for draft adapters (recipe.target: frozen) only.",
    )  # fmt: skip
    group.add_argument(
        "--answer-temperature", type=_number("from 0 to 2", lambda t: 0 <= t <= 2), default=0.0,
        metavar="T", help="Default: 0, greedy.",
    )  # fmt: skip
    group.add_argument(
        "--system", metavar="TEXT", help="System prompt of all chats. Default: the template's."
    )
    group.add_argument(
        "--seed", type=_integer(0, 2**63 - 1), default=0, metavar="N",
        help="The same seed gives the same questions on the same machine. Default: 0.",
    )  # fmt: skip


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-num-seqs", type=_integer(1, 2**20), metavar="N",
        help="Requests that run at once. Default: vLLM's.",
    )  # fmt: skip
    group.add_argument("--tensor-parallel-size", type=_integer(1, 2**20), default=1, metavar="N")
    add_dtype_and_device(group)
    group.add_argument("--max-model-len", type=int, metavar="N", help="Default: the model's.")
    group.add_argument(
        "--engine-args", type=engine_args, default={}, metavar="JSON",
        help='Further arguments of vLLM\'s LLM, such as \'{"gpu_memory_utilization": 0.8}\'.',
    )  # fmt: skip


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer from {least} to {most}")
        return value

    return parse


def _number(valid: str, is_valid: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {valid}")
        return value

    return parse


def run(args: argparse.Namespace) -> None:
    with needs_extra("gpu"):
        from vllm_layerskip.batch.self_chats import self_chats

    settings = _settings(args)
    for line in report(self_chats(settings), settings):
        print(line)


def _settings(args: argparse.Namespace) -> SelfChatsSettings:
    from vllm_layerskip.batch.self_chats import Sampling, SelfChatsSettings
    from vllm_layerskip.batch.settings import EngineSettings
    from vllm_layerskip.measuring.hardware import check_device, gpu_info

    check_device(args.device)
    at_once = {} if args.max_num_seqs is None else {"max_num_seqs": args.max_num_seqs}
    return SelfChatsSettings(
        output=args.output,
        num_chats=args.num_chats,
        engine=EngineSettings(
            model=args.model,
            speculation=False,
            tensor_parallel_size=args.tensor_parallel_size,
            device=args.device or ("cuda" if gpu_info() else "cpu"),
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            engine_args={**at_once, **args.engine_args},
        ),
        sampling=Sampling(
            temperature=args.temperature,
            top_p=args.top_p,
            max_question_tokens=args.max_question_tokens,
            max_answer_tokens=args.max_answer_tokens,
            answer_temperature=args.answer_temperature,
            system=args.system,
            seed=args.seed,
        ),
        exclude=args.exclude,
        keep_unfinished=args.keep_unfinished,
        max_minutes=args.max_minutes,
        overwrite=args.overwrite,
    )


def report(summary: Summary, settings: SelfChatsSettings) -> list[str]:
    """What to print, a line each."""
    cut = f" ({summary.num_unfinished} cut off)" if summary.num_unfinished else ""
    drops = ", ".join(f"{count} {reason}" for reason, count in summary.dropped.items())
    lines = [
        f"{summary.num_chats} chats{cut}, {summary.num_answer_tokens} tokens of answers: "
        f"{settings.output}",
        f"{summary.num_questions} questions, dropped: {drops or 'none'}.",
        _this_run(summary),
    ]
    recipe = "data: {train: {files: [" + str(settings.output) + "]}}"
    return [
        *lines,
        *([summary.note] if summary.note else []),
        f"Next: vllm-layerskip train --config RECIPE.yaml, with {recipe} in it "
        "(docs/training.md, Draft adapters).",
    ]


def _this_run(summary: Summary) -> str:
    if not summary.num_tokens_of_this_run:
        return "All was there from earlier runs, and no engine was started."
    rate = summary.num_tokens_of_this_run / summary.seconds
    return (
        f"This run: {summary.num_tokens_of_this_run} tokens of questions and answers in "
        f"{summary.seconds:.1f} s, {rate:.1f} tokens/s with the engine's start."
    )
