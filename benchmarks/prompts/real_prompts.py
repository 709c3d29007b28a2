# SPDX-License-Identifier: Apache-2.0
"""Acceptance and speed-up on real prompts, by category: Spec-Bench, HumanEval, GSM8K.

    python -m benchmarks.prompts.real_prompts --model MODEL \\
        --questions question.jsonl --output FILE.json

Each mode answers the same questions in a process of its own; --drafts names several drafts of
LayerSkip's, each as speculative_config would have it. Answers end where the model ends them: a base
model that runs past its end repeats itself, which inflates acceptance. Outputs are compared with
plain vLLM's. docs/benchmarks.md has the protocol.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import (
    add_output_arguments,
    check_output,
    make_parser,
    mistakes_reported,
    positive_int,
)
from benchmarks.engines.modes import VLLM_MODES
from benchmarks.prompts.drafts import named_config
from benchmarks.prompts.jobs import jobs
from benchmarks.prompts.records import is_record_of, load, save
from benchmarks.prompts.summary import label, outputs_differ
from benchmarks.prompts.tables import left_out, plain_record, position_table, table
from vllm_layerskip.commands.arguments import json_object
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.processes import exit_on_sigterm, log_tail, logged_process
from vllm_layerskip.measuring.provenance import COMMAND_VARIABLE, command_line

MODES = tuple(mode for mode in VLLM_MODES if mode != "early-exit")
COUNTS = (
    ("--batch-size", 1, "Requests at once. Default: 1."),
    ("--num-questions", None, "Taken evenly from the categories. Default: all."),
    ("--max-model-len", None, "Default: the model's."),
    ("--max-tokens", 256, "Of an answer. Default: 256."),
    ("--repeats", 3, "Runs, of which the median counts. Default: 3."),
)
"""Options that count something, with their defaults and help texts."""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="A checkpoint folder.")
    parser.add_argument("--questions", required=True, type=Path, help="JSON lines, also .gz.")
    add_output_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["plain", "layerskip"])
    parser.add_argument(
        "--pairs", nargs="+", type=_pair, metavar="E:K", help="Default: the checkpoint's."
    )
    parser.add_argument(
        "--drafts",
        nargs="+",
        type=named_config,
        metavar="NAME=JSON",
        help="In place of --pairs: keys of speculative_config. Default: the checkpoint's.",
    )
    parser.add_argument("--draft-vocab", help="With --pairs: a file of token ids, or a number.")
    for name, default, text in COUNTS:
        parser.add_argument(name, type=positive_int, default=default, help=text)
    _add_sampling_arguments(parser)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--engine-args", type=json_object, default={}, help="JSON, for LLM().")
    return parser


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="Default: 0.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action="store_true", help="Use the chat template.")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="Run past the end: shows what that inflates."
    )


def _pair(text: str) -> tuple[int, int]:
    exit_layer, _, num_drafts = text.partition(":")
    try:
        return int(exit_layer), int(num_drafts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be E:K, such as 8:6.") from None


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A job's record, from a process of its own.

    Raises:
        RuntimeError: the process failed; the message is its log's end.
    """
    path, output, log = folder / "job.json", folder / "record.json", folder / "log"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.prompts.measure"]
    with logged_process(
        [*command, str(path), str(output)], log, {COMMAND_VARIABLE: command_line()}
    ) as process:
        process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"{job['mode']} failed:\n{log_tail(log)}")
    return json.loads(output.read_text(encoding="utf-8"))


def missing_jobs(
    todo: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], output: Path | None
) -> list[dict[str, Any]]:
    """The jobs that have no record yet.

    Raises:
        UserError: ``output`` has records of no job.
    """
    others = [label(r) for r in records if not any(is_record_of(r, job) for job in todo)]
    if others:
        raise UserError(
            f"--resume: {output} has other runs ({'; '.join(others)}): its questions or "
            "settings differ, or --modes, --pairs or --drafts leave them out. Choose another file."
        )
    return [job for job in todo if not any(is_record_of(record, job) for record in records)]


def prepare(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records that ``--output`` has, and the jobs that it lacks.

    Raises:
        UserError: an option or a file is wrong; the message names it.
    """
    if "plain" not in args.modes:
        raise UserError(f"--modes {' '.join(args.modes)} must include plain, the baseline.")
    check_output(args)
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature} must be at least 0.")
    records = load(args.output) if args.output is not None and args.output.exists() else []
    todo, left_out_modes = jobs(args)
    for reason in left_out_modes:
        print(reason, flush=True)
    return records, missing_jobs(todo, records, args.output)


def run_all(
    todo: Iterable[dict[str, Any]], records: list[dict[str, Any]], output: Path | None
) -> list[str]:
    """Add the jobs' records to ``records`` and ``output``; the modes that failed."""
    failed = []
    for job in todo:
        with tempfile.TemporaryDirectory() as folder:
            try:
                records.append(run_job(job, Path(folder)))
            except RuntimeError as error:
                failed.append(job["mode"])
                print(f"real_prompts.py: error: {error}", file=sys.stderr, flush=True)
                continue
        print(f"{label(records[-1])}: {records[-1]['runs_tokens_per_s']} tokens/s", flush=True)
        if output is not None:
            save(output, records)
    return failed


def main() -> int:
    """Ask all modes, and print the tables.

    Returns:
        The exit status: 1 if a mode failed, or if greedy answers in float32 differ.
    """
    parser = build_parser()
    args = parser.parse_args()
    with mistakes_reported(parser):
        records, todo = prepare(args)
    failed = run_all(todo, records, args.output)
    if "plain" in failed:
        return 1
    print(f"\n{table(records)}\n\n{position_table(records)}\n\n{left_out(records)}")
    plain = plain_record(records)
    if args.dtype == "float32" and args.temperature == 0:
        differ = [label(record) for record in records if outputs_differ(record, plain)]
        if differ:
            print(f"In float32 outputs must be equal: {'; '.join(differ)} differ.")
            return 1
    return int(bool(failed))


if __name__ == "__main__":
    with exit_on_sigterm():
        sys.exit(main())
