# SPDX-License-Identifier: Apache-2.0
"""Score every exit layer of a checkpoint on held-out text, in one pass.

For each exit: perplexity, next-token accuracy, and agreement with the last layer (the share of
tokens at which both have the same argmax: the share of greedy drafts that verification would
accept after this text). --compare scores a second checkpoint too, such as one that was trained
without LayerSkip. --draft-quantization and --draft-adapter score the checkpoint's draft twin
beside it: layers and LM head with other weights, and agreement with the checkpoint's last layer.

Protocol: documents are joined to one stream of tokens, an end-of-sequence token after each, and
cut into windows of --seq-len tokens. Each token counts once. Perplexity is exp of the mean
negative log likelihood of a token over all windows. With --stride equal to --seq-len (the
default) windows do not overlap and the first token of each does not count; a smaller stride gives
each token more context and costs more passes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from vllm_layerskip.commands.arguments import checkpoint
from vllm_layerskip.errors import UserError, needs_extra
from vllm_layerskip.evaluation.settings import (
    DEFAULT_SEQ_LEN,
    BeginOfSequence,
    Dtype,
    EvalSettings,
    TextSettings,
    TwinSettings,
)
from vllm_layerskip.twins.kinds import CHOICES, NONE

if TYPE_CHECKING:
    from vllm_layerskip.evaluation.report import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoints(parser)
    _add_text(parser)
    _add_run(parser)
    _add_outputs(parser)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=checkpoint, metavar="MODEL", help="Folder or name of the checkpoint."
    )
    what.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="Measure nothing: show the result in a file that --json wrote.",
    )
    parser.add_argument(
        "--compare",
        type=checkpoint,
        metavar="OTHER",
        help="A second checkpoint with the same tokenizer.",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="Names of the checkpoints in table and plot. Default: their folders' names.",
    )
    parser.add_argument(
        "--draft-quantization",
        choices=CHOICES,
        help="Score the draft twin, too, with weights rounded to such numbers. Default: none.",
    )
    parser.add_argument(
        "--draft-adapter",
        metavar="PATH",
        help="Score the draft twin, too, with the adapter in this folder merged. Default: none.",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="Files, folders or patterns: text files; .jsonl, .json or .parquet files, of which "
        "each record is a string or has the text in --text-field. Or 'stdlib': the modules of "
        "Python's standard library that the embedded checkpoint was not trained on.",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="Default: text.")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="T",
        help=f"Tokens of a window. Default: {DEFAULT_SEQ_LEN}, or the model's maximum if less.",
    )
    parser.add_argument(
        "--stride", type=int, metavar="S", help="Tokens between windows' starts. Default: T."
    )
    parser.add_argument(
        "--bos",
        choices=get_args(BeginOfSequence),
        default="document",
        help="Where the beginning-of-sequence token stands, if the tokenizer has one: before each "
        "document (default), at the head of each window, or nowhere.",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="Use the first N tokens. Default: all."
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="B", help="Windows at once. Default: 4."
    )
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="float32", help="Default: float32."
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--trust-remote-code", action="store_true")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="Write the table.")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="Draw it: .png, .svg or .pdf, by the name's end."
    )


def run(args: argparse.Namespace) -> None:
    _check_outputs(args)
    with needs_extra("train"):
        import rich  # noqa: F401
        import transformers  # noqa: F401
    from vllm_layerskip.evaluation import report

    if args.from_json is not None:
        _refuse_with_from_json(args)
        result = report.read_json(args.from_json)
    else:
        from vllm_layerskip.evaluation.evaluate import evaluate

        result = evaluate(_settings(args))
    _print(result)
    if args.json is not None:
        report.write_json(result, args.json)
    if args.markdown is not None:
        args.markdown.write_text(report.markdown(result), encoding="utf-8")
    if args.plot is not None:
        from vllm_layerskip.evaluation.plot import write_plot

        write_plot(result, args.plot)


def _settings(args: argparse.Namespace) -> EvalSettings:
    return EvalSettings(
        model=args.model,
        compare=args.compare,
        twin=_twin(args.draft_quantization or NONE, args.draft_adapter),
        labels=None if args.labels is None else tuple(args.labels),
        text=TextSettings(
            sources=tuple(args.data or ()),
            text_field=args.text_field,
            bos=args.bos,
            max_tokens=args.max_tokens,
            seq_len=args.seq_len,
            stride=args.stride,
        ),
        dtype=args.dtype,
        device=args.device,
        batch_size=args.batch_size,
        trust_remote_code=args.trust_remote_code,
        argv=tuple(args.argv),
    )


def _twin(draft_quantization: str, draft_adapter: str | None) -> TwinSettings | None:
    adapter = None if draft_adapter == NONE else draft_adapter
    if draft_quantization == NONE and adapter is None:
        return None
    return TwinSettings(draft_quantization, adapter)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written, before minutes of work are spent."""
    for option in ("json", "markdown", "plot"):
        path: Path | None = getattr(args, option)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"--{option} {path} must be a file in a folder that exists.")
    if args.plot is not None:
        from vllm_layerskip.evaluation.plot import check_path

        check_path(args.plot)


def _refuse_with_from_json(args: argparse.Namespace) -> None:
    for option in (
        "compare", "labels", "draft_quantization", "draft_adapter", "data", "seq_len", "stride",
        "max_tokens",
    ):  # fmt: skip
        if getattr(args, option) is not None:
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag} and --from-json exclude each other: nothing is measured.")


def _print(result: Result) -> None:
    from rich.console import Console

    from vllm_layerskip.evaluation.report import terminal_table

    # For a pipe rich would take 80 columns and fold numbers.
    Console(width=None if sys.stdout.isatty() else 160).print(terminal_table(result))
