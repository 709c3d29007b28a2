# SPDX-License-Identifier: Apache-2.0
"""Acceptance and speed-up on real prompts, by category: Spec-Bench, HumanEval, GSM8K.

    python -m benchmarks.prompts.real_prompts --model MODEL \\
        --questions question.jsonl --output FILE.json

Each mode runs in a process of its own on the same questions; answers end where the model ends them
(running past that makes base models repeat themselves, which inflates acceptance). Outputs are
compared with plain vLLM's. docs/benchmarks.md has the protocol.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.decode.report import markdown
from benchmarks.engines.modes import VLLM_MODES
from benchmarks.engines.settings import Settings, read_config
from benchmarks.prompts.chats import Chats
from benchmarks.prompts.measure import Sampling
from benchmarks.prompts.questions import Question, read_questions, spread
from benchmarks.prompts.summary import label, outputs_differ, summarize
from vllm_layerskip.measuring.processes import log_tail, logged_process
from vllm_layerskip.measuring.provenance import COMMAND_VARIABLE, command_line

MODES = tuple(mode for mode in VLLM_MODES if mode != "early-exit")
SCHEMA = 1
HEADER = ("category", "questions", "answers", "tokens an answer", "mode", "acceptance length",
          "tokens/s", "speed-up", "of decoding", "equal to plain")  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="A checkpoint folder.")
    parser.add_argument("--questions", required=True, type=Path, help="JSON lines, also .gz.")
    parser.add_argument("--output", type=Path, help="Result file.")
    parser.add_argument("--resume", action="store_true", help="Go on with --output.")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["plain", "layerskip"])
    parser.add_argument(
        "--pairs", nargs="+", type=_pair, metavar="E:K", help="Default: the checkpoint's."
    )
    parser.add_argument("--draft-vocab", help="As compare.py's.")
    parser.add_argument("--batch-size", type=int, default=1, help="Requests at once. Default: 1.")
    parser.add_argument("--num-questions", type=int, help="Spread over categories. Default: all.")
    parser.add_argument("--max-model-len", type=int, help="Default: the model's.")
    parser.add_argument("--max-tokens", type=int, default=256, help="Of an answer. Default: 256.")
    parser.add_argument(
        "--repeats", type=int, default=3, help="Runs, of which the median counts. Default: 3."
    )
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
    if args.output is not None and args.output.exists() and not args.resume:
        parser.error(f"--output {args.output} exists. Add --resume, or choose another file.")
    for option in ("batch_size", "max_tokens", "repeats", "num_questions", "max_model_len"):
        value = getattr(args, option)
        if value is not None and value < 1:
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
    _check_pairs(pairs, config["num_hidden_layers"])
    longest = max(k for _, k in pairs)
    max_model_len = args.max_model_len or config["max_position_embeddings"]
    max_prompt_tokens = max_model_len - args.max_tokens - longest - 1
    if max_prompt_tokens < 1:
        raise ValueError(
            f"--max-tokens {args.max_tokens} leaves no room for a prompt: the model takes "
            f"{max_model_len} tokens. Lower it."
        )
    all_questions = read_questions(args.questions)
    fitting = fitting_questions(all_questions, args, max_prompt_tokens)
    if not fitting:
        raise ValueError(
            f"--questions {args.questions}: none has a first prompt of at most {max_prompt_tokens} "
            "tokens. Lower --max-tokens, or give shorter questions."
        )
    questions = spread(fitting, args.num_questions)
    sampling = Sampling(
        args.max_tokens, args.temperature, args.seed, args.ignore_eos, args.chat, max_prompt_tokens
    )
    source = {
        "file": args.questions.name,
        "sha256": hashlib.sha256(args.questions.read_bytes()).hexdigest(),
        "num_questions": len(questions),
        "of": len(all_questions),
        "too_long": dict(
            Counter(q.category for q in all_questions) - Counter(q.category for q in fitting)
        ),
    }
    return [
        {
            "mode": mode,
            "settings": asdict(_settings(args, pair, max_prompt_tokens + longest - pair[1])),
            "sampling": asdict(sampling),
            "questions": [asdict(question) for question in questions],
            "source": source,
        }
        for mode, pair in runs(args.modes, pairs)
    ]


def runs(
    modes: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> list[tuple[str, tuple[int, int]]]:
    """A mode with its (E, K) for each process; plain decoding needs no pair, n-gram only K."""
    found: dict[tuple[str, int, int], tuple[str, tuple[int, int]]] = {}
    for mode in modes:
        for exit_layer, num_drafts in pairs:
            e = 0 if mode in ("plain", "ngram") else exit_layer
            k = 0 if mode == "plain" else num_drafts
            found.setdefault((mode, e, k), (mode, (exit_layer, num_drafts)))
    return list(found.values())


def fitting_questions(
    questions: Sequence[Question], args: argparse.Namespace, max_prompt_tokens: int
) -> list[Question]:
    """Those whose first turn leaves room for the answer.

    Raises:
        ValueError: the model has no chat template to use.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: {args.model} has no chat template. Leave --chat out.")
    chats = Chats(tokenizer, args.chat)
    return [
        question
        for question in questions
        if 0 < len(chats.token_ids(question.turns[:1])) <= max_prompt_tokens
    ]


def _check_pairs(pairs: Iterable[tuple[int, int]], num_layers: int) -> None:
    for exit_layer, num_drafts in pairs:
        if not (1 <= exit_layer < num_layers and num_drafts >= 1):
            raise ValueError(
                f"--pairs {exit_layer}:{num_drafts}: E must be from 1 to {num_layers - 1}, and K "
                "at least 1. Give E:K, such as 8:6."
            )


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
    command = [sys.executable, "-m", "benchmarks.prompts.measure"]
    with logged_process(
        [*command, str(path), str(output)], log, {COMMAND_VARIABLE: command_line()}
    ) as process:
        process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"{job['mode']} failed:\n{log_tail(log)}")
    return json.loads(output.read_text(encoding="utf-8"))


def is_record_of(record: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    """Whether a record is what the job would measure."""
    settings = Settings(**job["settings"])
    ours = settings.identity() | {"batch_size": settings.batch_sizes[0]}
    return (
        record["mode"] == job["mode"]
        and record["settings"] == ours
        and record["sampling"] == job["sampling"]
        and record["questions"] == job["source"]
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """All modes, category by category, as Markdown."""
    plain = next(record for record in records if record["mode"] == "plain")
    rows: dict[str, list[list[str]]] = {}
    for record in records:
        for result in summarize(record, plain):
            cells = [
                result.category,
                str(result.num_questions),
                str(result.num_answers),
                f"{result.num_tokens:.0f}",
                label(record),
                two_digits(result.acceptance_length),
                f"{result.tokens_per_s:.1f}",
                two_digits(result.speedup),
                two_digits(result.decoding_speedup),
                "" if result.num_equal is None else f"{result.num_equal} of {result.num_answers}",
            ]
            rows.setdefault(result.category, []).append(cells)
    return markdown(HEADER, [cells for of_category in rows.values() for cells in of_category])


def two_digits(value: float | None) -> str:
    """A cell."""
    return "" if value is None else f"{value:.2f}"


def category_table(records: Sequence[dict[str, Any]], *, speedups: bool) -> str:
    """Acceptance length of LayerSkip's modes, and their speed-up, a row for each category."""
    plain = next(record for record in records if record["mode"] == "plain")
    drafting = [record for record in records if record["mode"] == "layerskip"]
    results = [summarize(record, plain) for record in drafting]
    header = ["category", "questions", "answers"]
    for record in drafting:
        name = label(record).removeprefix("layerskip, ")
        header.append(f"acceptance length, {name}")
        if speedups:
            header.append(f"speed-up, {name}")
    body = []
    for of_category in zip(*results, strict=True):
        first = of_category[0]
        cells = [first.category, str(first.num_questions), str(first.num_answers)]
        for result in of_category:
            cells.append(two_digits(result.acceptance_length))
            if speedups:
                cells.append(two_digits(result.speedup))
        body.append(cells)
    return markdown(header, body)


def left_out(records: Sequence[dict[str, Any]]) -> str:
    """How many questions and later turns had no place, by category."""
    too_long = records[0]["questions"]["too_long"]
    later = records[0]["later_turns_left_out"]
    parts = []
    if too_long:
        parts.append(f"questions of the file by their first prompt, {_by_category(too_long)}")
    if later:
        parts.append(f"later turns, whose prompt has the answer before, {_by_category(later)}")
    if not parts:
        return "Nothing was left out."
    limit = records[0]["sampling"]["max_prompt_tokens"]
    return f"Left out, since a prompt may have {limit} tokens: {'; '.join(parts)}."


def _by_category(counts: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {number}" for name, number in counts.items())
    return f"{sum(counts.values())} ({parts})"


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
        records = load(args.output) if args.output is not None and args.output.exists() else []
        others = [label(r) for r in records if not any(is_record_of(r, job) for job in todo)]
        if others:
            raise ValueError(
                f"--resume: {args.output} has other runs ({'; '.join(others)}): its questions or "
                "settings differ, or --modes or --pairs leave them out. Choose another file."
            )
    except ValueError as error:
        print(f"real_prompts.py: error: {error}", file=sys.stderr)
        return 2
    failed = []
    for job in todo:
        if any(is_record_of(record, job) for record in records):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                records.append(run_job(job, Path(folder)))
            except RuntimeError as error:
                failed.append(job["mode"])
                print(f"real_prompts.py: error: {error}", file=sys.stderr, flush=True)
                continue
        print(f"{label(records[-1])}: {records[-1]['runs_tokens_per_s']} tokens/s", flush=True)
        if args.output is not None:
            content = {"schema": SCHEMA, "kind": "real-prompts", "records": records}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if "plain" in failed:
        return 1
    print(f"\n{table(records)}\n\n{left_out(records)}")
    plain = next(record for record in records if record["mode"] == "plain")
    if args.dtype == "float32" and args.temperature == 0:
        differ = [label(record) for record in records if outputs_differ(record, plain)]
        if differ:
            print(f"In float32 outputs must be equal: {'; '.join(differ)} differ.")
            return 1
    return int(bool(failed))


if __name__ == "__main__":
    # So that a mode's process ends with this one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
