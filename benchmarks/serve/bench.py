# SPDX-License-Identifier: Apache-2.0
"""Serving under load: ``vllm serve`` for each mode, and ``vllm bench serve`` at it.

    python -m benchmarks.serve.bench --model DIR --questions path/to/spec_bench/question.jsonl \\
        --concurrency 1 4 16 64 --output benchmarks/results/serve.json

The questions (Spec-Bench's ``question.jsonl``, or JSON lines with ``prompt``) are the first turns,
taken from the categories in turn; one that is longer than ``--max-prompt-tokens`` is left out. They
are sent as they are, without a chat template. Prefix caching is off: every concurrency asks the
same questions. With dummy weights answers run to their full length; a checkpoint's end where it
ends them. Time per output token (TPOT), time to first token (TTFT) and acceptance are vLLM's own.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engines.arguments import command_line_flags, engine_arguments, prepare_environment
from benchmarks.engines.modes import VLLM_MODES
from benchmarks.engines.results import Record, add_record, finished_cells, load_records
from benchmarks.engines.settings import Settings, add_arguments, settings_from
from benchmarks.serve.summary import SERVE_HEADER, serve_cells
from vllm_layerskip.measuring.processes import log_tail, logged_process
from vllm_layerskip.measuring.provenance import provenance

EMBEDDED = Path(__file__).parents[2] / "vllm_layerskip" / "checkpoint"
MODEL_NAME = "benchmark"
START_TIMEOUT_S = 600
REQUESTS_PER_SLOT = 8
MIN_REQUESTS = 26  # Two of each of Spec-Bench's 13 categories.


@dataclass(frozen=True)
class Load:
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
        ValueError: none is short enough.
    """
    from transformers import AutoTokenizer

    by_category: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = record["prompt"] if "prompt" in record else record["turns"][0]
        by_category[record.get("category", "")].append(text)
    turns = zip_longest(*(texts for _, texts in sorted(by_category.items())))
    texts = [text for turn in turns for text in turn if text is not None]
    lengths = AutoTokenizer.from_pretrained(tokenizer)(texts, verbose=False)["input_ids"]
    chosen = [
        text for text, ids in zip(texts, lengths, strict=True) if len(ids) <= max_prompt_tokens
    ]
    if not chosen:
        raise ValueError(
            f"--questions={path} has no question of at most {max_prompt_tokens} tokens. Raise "
            "--max-prompt-tokens."
        )
    return chosen


@contextmanager
def server(
    settings: Settings, mode: str, tokenizer: Path, log: Path
) -> Iterator[tuple[str, float]]:
    """``vllm serve``, ready: its URL and the seconds that its start took.

    Raises:
        RuntimeError: it ended before it was ready; the message holds the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = engine_arguments(settings, mode, Path(folder))
        # Requests come as text.
        arguments |= {"skip_tokenizer_init": False, "tokenizer": str(tokenizer)}
        arguments |= {"enable_prefix_caching": False}
        del arguments["disable_log_stats"]
        port = _free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", arguments["model"]]
        command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
        start = time.monotonic()
        command += command_line_flags(arguments)
        # A server's engine lives in a process of its own, on a CPU too.
        with logged_process(command, log, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) as process:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, url, log)
            yield url, round(time.monotonic() - start, 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {process.returncode}: {log_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"vllm serve was not ready after {START_TIMEOUT_S} s: {log_tail(log)}")


def bench(url: str, load: Load, concurrency: int, settings: Settings, log: Path) -> dict[str, Any]:
    """Run ``vllm bench serve`` at one concurrency; its scalar results.

    Raises:
        RuntimeError: it failed; the message holds the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve",
            "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions",
            "--model", MODEL_NAME, "--tokenizer", str(load.tokenizer),
            "--dataset-name", "custom", "--dataset-path", str(load.dataset),
            "--custom-output-len", str(settings.output_len), "--skip-chat-template",
            "--disable-shuffle", "--no-oversample", "--temperature", "0", "--seed", "0",
            "--num-prompts", str(load.num_requests(concurrency)),
            "--max-concurrency", str(concurrency), "--num-warmups", str(concurrency),
            "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
            "--save-result", "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        if load.ignore_eos:
            command.append("--ignore-eos")
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


def measure_mode(
    settings: Settings, mode: str, load: Load, output: Path, deadline: float | None
) -> None:
    """Serve one mode and measure it at every concurrency that ``output`` lacks."""
    identity = settings.identity()
    common = {"kind": "serve", "mode": mode, "settings": identity, "provenance": provenance()}
    common |= {"dataset": {"questions": load.num_questions, "tokenizer": load.tokenizer.name}}
    finished = finished_cells(load_records(output), mode, identity)
    left = [level for level in sorted(settings.batch_sizes) if (level,) not in finished]
    logs = output.with_suffix(".logs")

    def add(record: Record) -> None:
        add_record(output, common | record)
        print(f"{mode}: {' | '.join(serve_cells(common | record))}", flush=True)

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


def parse_arguments() -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--num-speculative-tokens", type=int, help="K")
    parser.add_argument("--modes", nargs="+", choices=VLLM_MODES, default=["plain", "layerskip"])
    parser.add_argument("--questions", type=Path, required=True, help="Spec-Bench's JSON lines.")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--requests-per-slot", type=int, default=REQUESTS_PER_SLOT)
    parser.add_argument("--min-requests", type=int, default=MIN_REQUESTS)
    parser.add_argument("--tokenizer", type=Path, help="Default: the model's, or the embedded one.")
    parser.add_argument("--time-limit", type=float, help="Seconds; no load is begun beyond.")
    parser.add_argument("--output", type=Path, help="Result file.")
    parser.add_argument("--resume", action="store_true", help="Go on with --output.")
    args = parser.parse_args()
    if args.output is not None and args.output.exists() and not args.resume:
        parser.error(f"--output={args.output} exists. Add --resume, or choose another file.")
    try:
        settings = settings_from(args)
    except ValueError as error:
        parser.error(str(error))
    return args, replace(
        settings,
        batch_sizes=args.concurrency,
        prompt_lens=[args.max_prompt_tokens],
        prompts=args.questions.name,
    )


def main() -> None:
    args, settings = parse_arguments()
    prepare_environment(settings.device)
    model = Path(settings.model) if settings.model else EMBEDDED
    tokenizer = args.tokenizer or model
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    with tempfile.TemporaryDirectory() as scratch:
        texts = select_questions(args.questions, tokenizer, args.max_prompt_tokens)
        dataset = Path(scratch) / "questions.jsonl"
        lines = (json.dumps({"prompt": text}) for text in texts)
        dataset.write_text("\n".join(lines), encoding="utf-8")
        load = Load(
            dataset,
            tokenizer,
            num_questions=len(texts),
            requests_per_slot=args.requests_per_slot,
            min_requests=args.min_requests,
            ignore_eos=settings.model is None,
        )
        output = args.output or Path(scratch) / "results.json"
        for mode in args.modes:
            measure_mode(settings, mode, load, output, deadline)
        records = load_records(output)
    table = Table(title="Serving")
    for column in SERVE_HEADER:
        table.add_column(column, justify="right")
    for record in records:
        table.add_row(*serve_cells(record))
    Console(width=150).print(table)
    if any(record["status"] == "error" for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
