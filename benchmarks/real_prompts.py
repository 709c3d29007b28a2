# SPDX-License-Identifier: Apache-2.0
"""Acceptance and speed-up on real prompts, by category: Spec-Bench, HumanEval, GSM8K.

    python benchmarks/real_prompts.py --model MODEL --questions question.jsonl --output FILE.json

Each mode runs in a process of its own on the same questions; answers end where the model ends them
(running past that makes base models repeat themselves, which inflates acceptance). Outputs are
compared with plain vLLM's. docs/benchmarks.md has the protocol.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure_prompts import Sampling
from modes import VLLM_MODES
from prompt_summary import label, summarize
from questions import read_questions, spread
from report import markdown
from settings import Settings, read_config

from vllm_layerskip.tuning.processes import log_tail, logged_process
from vllm_layerskip.tuning.provenance import COMMAND_VARIABLE, command_line

MODES = tuple(mode for mode in VLLM_MODES if mode != "early-exit")
SCHEMA = 1
HEADER = ("category", "answers", "tokens", "mode", "acceptance length", "ms a token",
          "speed-up", "equal to plain")  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="A checkpoint folder.")
    parser.add_argument("--questions", required=True, type=Path, help="JSON lines, also .gz.")
    parser.add_argument("--output", type=Path, help="Result file.")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["plain", "layerskip"])
    parser.add_argument(
        "--pairs", nargs="+", type=_pair, metavar="E:K", help="Default: the checkpoint's."
    )
    parser.add_argument("--draft-vocab", help="As compare.py's.")
    parser.add_argument("--batch-size", type=int, default=1, help="Requests at once. Default: 1.")
    parser.add_argument("--num-questions", type=int, help="Spread over categories. Default: all.")
    parser.add_argument("--max-tokens", type=int, default=256, help="Of an answer. Default: 256.")
    parser.add_argument("--repeats", type=int, default=3, help="Default: 3, at least.")
    parser.add_argument("--temperature", type=float, default=0.0, help="Default: 0.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action="store_true", help="Use the chat template.")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="Run past the end: shows what that inflates."
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON, for LLM().")
    args = parser.parse_args(argv)
    if "plain" not in args.modes:
        parser.error(f"--modes {' '.join(args.modes)} must include plain, the baseline.")
    for option in ("batch_size", "max_tokens", "repeats"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be an integer of at least 1.")
    return args


def _pair(text: str) -> tuple[int, int]:
    exit_layer, _, num_drafts = text.partition(":")
    try:
        return int(exit_layer), int(num_drafts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be E:K, such as 8:6.") from None


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each process.

    Raises:
        ValueError: an option or a file is wrong; the message names it.
    """
    config = read_config(args.model)
    block = config.get("layerskip") or {}
    pairs = args.pairs
    if pairs is None:
        if not {"exit_layer", "num_speculative_tokens"} <= set(block):
            raise ValueError(f"--pairs: {args.model} has no layerskip block. Give E:K.")
        pairs = [(block["exit_layer"], block["num_speculative_tokens"])]
    longest = max(k for _, k in pairs)
    max_prompt_tokens = config["max_position_embeddings"] - args.max_tokens - longest - 1
    if max_prompt_tokens < 1:
        raise ValueError(
            f"--max-tokens {args.max_tokens} leaves no room for a prompt: the model takes "
            f"{config['max_position_embeddings']} tokens. Lower it."
        )
    all_questions = read_questions(args.questions)
    questions = spread(all_questions, args.num_questions)
    sampling = Sampling(
        args.max_tokens, args.temperature, args.seed, args.ignore_eos, args.chat, max_prompt_tokens
    )
    runs: list[tuple[str, tuple[int, int]]] = []
    for mode in args.modes:
        runs += [(mode, pair) for pair in (pairs[:1] if mode == "plain" else pairs)]
    return [
        {
            "mode": mode,
            "settings": asdict(_settings(args, pair, max_prompt_tokens + longest - pair[1])),
            "sampling": asdict(sampling),
            "questions": [asdict(question) for question in questions],
            "source": {
                "file": args.questions.name,
                "num_questions": len(questions),
                "of": len(all_questions),
            },
        }
        for mode, pair in dict.fromkeys(runs)
    ]


def _settings(args: argparse.Namespace, pair: tuple[int, int], max_prompt_tokens: int) -> Settings:
    return Settings(
        model=args.model,
        exit_layer=pair[0],
        num_speculative_tokens=pair[1],
        draft_vocab=args.draft_vocab,
        batch_sizes=[args.batch_size],
        prompt_lens=[max_prompt_tokens],
        output_len=args.max_tokens,
        repeats=args.repeats,
        prompts=args.questions.name,
        dtype=args.dtype,
        device=args.device,
        enforce_eager=args.enforce_eager,
        engine_args=args.engine_args,
    )


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A job's record, from a process of its own.

    Raises:
        RuntimeError: the process failed; the message is its log's end.
    """
    path, output, log = folder / "job.json", folder / "record.json", folder / "log"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("measure_prompts.py"))]
    with logged_process(
        [*command, str(path), str(output)], log, {COMMAND_VARIABLE: command_line()}
    ) as process:
        process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"{job['mode']} failed:\n{log_tail(log)}")
    return json.loads(output.read_text(encoding="utf-8"))


def table(records: Sequence[dict[str, Any]]) -> str:
    """All modes, category by category, as Markdown."""
    plain = next(record for record in records if record["mode"] == "plain")
    rows: list[tuple[str, list[str]]] = []
    for record in records:
        for result in summarize(record, plain):
            length = result.acceptance_length
            rows.append(
                (
                    result.category,
                    [
                        result.category,
                        str(result.num_answers),
                        f"{result.num_tokens:.0f}",
                        label(record),
                        "" if length is None else f"{length:.2f}",
                        f"{result.tpot_ms:.2f}",
                        f"{result.speedup:.2f}",
                        f"{result.num_equal} of {result.num_answers}",
                    ],
                )
            )
    order = list(dict.fromkeys(category for category, _ in rows))
    return markdown(HEADER, [row for c in order for category, row in rows if category == c])


def left_out(records: Iterable[dict[str, Any]]) -> str:
    """How many turns had no place, by category."""
    counts = next(iter(records))["left_out"]
    if not counts:
        return "No turn was left out."
    parts = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
    return f"Left out, since prompt and answer do not fit the model's length: {parts} turns."


def load(path: Path) -> list[dict[str, Any]]:
    """Records of a result file.

    Raises:
        ValueError: it is another kind of file.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("kind") != "real-prompts" or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result file of real_prompts.py.")
    return content["records"]


def main() -> int:
    args = parse_args()
    try:
        todo = jobs(args)
    except ValueError as error:
        print(f"real_prompts.py: error: {error}", file=sys.stderr)
        return 2
    records = []
    for job in todo:
        with tempfile.TemporaryDirectory() as folder:
            records.append(run_job(job, Path(folder)))
        print(f"{label(records[-1])}: {records[-1]['runs_tokens_per_s']} tokens/s", flush=True)
        if args.output is not None:
            content = {"schema": SCHEMA, "kind": "real-prompts", "records": records}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(records)}\n\n{left_out(records)}")
    plain = next(record for record in records if record["mode"] == "plain")
    if args.dtype == "float32" and args.temperature == 0:
        differ = [
            r for r in records if any(s.num_equal < s.num_answers for s in summarize(r, plain))
        ]
        if differ:
            print(f"In float32 outputs must be equal: {', '.join(map(label, differ))} differ.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
