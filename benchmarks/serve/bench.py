# SPDX-License-Identifier: Apache-2.0
"""Serving under load: ``vllm serve`` for each mode, and ``vllm bench serve`` at it.

    python -m benchmarks.serve.bench --model DIR --questions path/to/spec_bench/question.jsonl \\
        --concurrency 1 4 16 64 --output benchmarks/results/serve.json

Asks the first turns of a file of questions (Spec-Bench's ``question.jsonl``, or another format of
``benchmarks/engines/questions.py``), taken from the categories in turn, without a chat template. A
turn that is longer than ``--max-prompt-tokens`` is left out. Prefix caching is off, since every
concurrency asks the same questions. With dummy weights answers run to their full length; a
checkpoint ends its answers itself. Time per output token (TPOT), time to first token (TTFT) and
acceptance are those that vLLM reports.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engines.arguments import prepare_environment
from benchmarks.engines.command_line import (
    add_output_arguments,
    check_output,
    make_parser,
    mistakes_reported,
    positive_int,
)
from benchmarks.engines.modes import VLLM_MODES
from benchmarks.engines.questions import by_category, in_turn, read_questions
from benchmarks.engines.results import Record, add_record, finished_cells, load_records
from benchmarks.engines.settings import Settings, add_arguments, settings_from
from benchmarks.serve.server import MODEL_NAME, VLLM, server
from benchmarks.serve.summary import SERVE_HEADER, serve_columns
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.tokenizers import load_tokenizer
from vllm_layerskip.measuring.processes import log_tail, logged_process
from vllm_layerskip.measuring.provenance import provenance

REQUESTS_PER_SLOT = 8
MIN_REQUESTS = 26  # Two of each of Spec-Bench's 13 categories.


@dataclass(frozen=True)
class ClientLoad:
    """What the clients send."""

    dataset: Path
    tokenizer: Path
    num_questions: int
    requests_per_slot: int
    min_requests: int
    ignore_eos: bool

    def num_requests(self, concurrency: int) -> int:
        wanted = max(self.min_requests, self.requests_per_slot * concurrency)
        return min(self.num_questions, wanted)


def select_questions(path: Path, tokenizer: Path, max_prompt_tokens: int) -> list[str]:
    """First turns of at most ``max_prompt_tokens`` tokens, one of each category in turn.

    Raises:
        UserError: a file cannot be read, or no question is short enough.
    """
    categories = sorted(by_category(read_questions(path)).items())
    texts = [question.turns[0] for question in in_turn(group for _, group in categories)]
    lengths = load_tokenizer(str(tokenizer), "--tokenizer")(texts, verbose=False)["input_ids"]
    chosen = [
        text for text, ids in zip(texts, lengths, strict=True) if len(ids) <= max_prompt_tokens
    ]
    if not chosen:
        raise UserError(
            f"--questions={path} has no question of at most {max_prompt_tokens} tokens. Raise "
            "--max-prompt-tokens."
        )
    return chosen


def bench(
    url: str, load: ClientLoad, concurrency: int, settings: Settings, log: Path
) -> dict[str, Any]:
    """Run ``vllm bench serve`` at one concurrency; its scalar results.

    Raises:
        RuntimeError: it failed; the message holds the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = bench_command(url, load, concurrency, settings.output_len)
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        with logged_process(command, log) as process:
            process.wait()
        result = Path(folder) / "result.json"
        if process.returncode != 0 or not result.exists():
            raise RuntimeError(f"vllm bench serve failed: {log_tail(log)}")
        content = json.loads(result.read_text(encoding="utf-8"))
    if not content["completed"]:
        raise RuntimeError(f"vllm bench serve completed no request: {log_tail(log)}")
    return {
        name: value
        for name, value in content.items()
        if name.startswith("spec_decode") or isinstance(value, int | float)
    }


def bench_command(url: str, load: ClientLoad, concurrency: int, output_len: int) -> list[str]:
    """``vllm bench serve`` with this load, greedily."""
    command = [
        *VLLM, "bench", "serve",
        "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions",
        "--model", MODEL_NAME, "--tokenizer", str(load.tokenizer),
        "--dataset-name", "custom", "--dataset-path", str(load.dataset),
        "--custom-output-len", str(output_len), "--skip-chat-template",
        "--disable-shuffle", "--no-oversample", "--temperature", "0", "--seed", "0",
        "--num-prompts", str(load.num_requests(concurrency)),
        "--max-concurrency", str(concurrency), "--num-warmups", str(concurrency),
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
    ]  # fmt: skip
    return [*command, "--ignore-eos"] if load.ignore_eos else command


def measure_mode(
    settings: Settings, mode: str, load: ClientLoad, output: Path, deadline: float | None
) -> None:
    """Serve one mode and measure it at every concurrency that ``output`` lacks.

    Args:
        deadline: on ``time.monotonic``.
    """
    identity = settings.identity()
    common = {"kind": "serve", "mode": mode, "settings": identity, "provenance": provenance()}
    common |= {"dataset": {"questions": load.num_questions, "tokenizer": load.tokenizer.name}}
    finished = finished_cells(load_records(output), mode, identity)
    left = [level for level in sorted(settings.batch_sizes) if (level,) not in finished]
    logs = output.with_suffix(".logs")

    def add(record: Record) -> None:
        add_record(output, common | record)
        print(f"{mode}: {' | '.join(serve_columns(common | record))}", flush=True)

    if not left:
        return
    if _is_over(deadline):
        add({"status": "no-time", "reason": "the table's time limit"})
        return
    try:
        with server(settings, mode, load.tokenizer, logs / f"serve-{mode}.log") as (url, start_s):
            for concurrency in left:
                cell: Record = {"concurrency": concurrency, "engine": {"start_s": start_s}}
                if _is_over(deadline):
                    add(cell | {"status": "no-time", "reason": "the table's time limit"})
                    continue
                log = logs / f"bench-{mode}-{concurrency}.log"
                result = bench(url, load, concurrency, settings, log)
                add(cell | {"status": "ok", "result": result})
    except RuntimeError as error:
        add({"status": "error", "reason": str(error).split(":")[0], "error": str(error)})


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=VLLM_MODES, default=["plain", "layerskip"])
    parser.add_argument("--questions", type=Path, required=True, help="Spec-Bench's JSON lines.")
    parser.add_argument("--concurrency", nargs="+", type=positive_int, default=[1, 4, 16, 64])
    parser.add_argument("--max-prompt-tokens", type=positive_int, default=1024)
    parser.add_argument("--requests-per-slot", type=int, default=REQUESTS_PER_SLOT)
    parser.add_argument("--min-requests", type=int, default=MIN_REQUESTS)
    parser.add_argument("--tokenizer", type=Path, help="Default: the model's, or the embedded one.")
    parser.add_argument("--time-limit", type=float, help="Seconds; no load is begun beyond.")
    add_output_arguments(parser)
    return parser


def serve_settings(args: argparse.Namespace) -> Settings:
    """The settings that the options ask for; a batch size is a concurrency here.

    Raises:
        UserError: options are missing or exclude each other.
    """
    check_output(args)
    return replace(
        settings_from(args),
        batch_sizes=args.concurrency,
        prompt_lens=[args.max_prompt_tokens],
        prompts=args.questions.name,
    )


@contextmanager
def client_load(args: argparse.Namespace, settings: Settings) -> Iterator[ClientLoad]:
    """The load, with its questions in a file for ``vllm bench serve``.

    Raises:
        UserError: the questions or the tokenizer cannot be read.
    """
    tokenizer = args.tokenizer or Path(settings.model or embedded_checkpoint())
    texts = select_questions(args.questions, tokenizer, args.max_prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "questions.jsonl"
        lines = (json.dumps({"prompt": text}) for text in texts)
        dataset.write_text("\n".join(lines), encoding="utf-8")
        yield ClientLoad(
            dataset,
            tokenizer,
            num_questions=len(texts),
            requests_per_slot=args.requests_per_slot,
            min_requests=args.min_requests,
            ignore_eos=settings.model is None,
        )


def rich_table(records: Sequence[Record]) -> Table:
    table = Table(title="Serving")
    for column in SERVE_HEADER:
        table.add_column(column, justify="right")
    for record in records:
        table.add_row(*serve_columns(record))
    return table


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    with mistakes_reported(parser), tempfile.TemporaryDirectory() as scratch:
        settings = serve_settings(args)
        prepare_environment(settings.device)
        output = args.output or Path(scratch) / "results.json"
        with client_load(args, settings) as load:
            for mode in args.modes:
                measure_mode(settings, mode, load, output, deadline)
        records = load_records(output)
    Console(width=150).print(rich_table(records))
    if any(record["status"] == "error" for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
