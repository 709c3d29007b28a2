# SPDX-License-Identifier: Apache-2.0
"""Choose the token ids that drafts may be: the most frequent ones of a corpus.

Give texts like those that the model will write. Every tenth passage is not counted but
held out, and the coverage is measured on it: a token that is not covered is never drafted,
and each one that the model writes ends a run of accepted drafts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_layerskip.commands.arguments import checkpoint
from vllm_layerskip.errors import UserError, needs_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=checkpoint,
        required=True,
        help="Folder or name of the checkpoint: its tokenizer counts.",
    )
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="FILE",
        help="Files, folders or patterns: text files; .jsonl, .json or .parquet files, of which "
        "each record is a string or has the text in --text-field.",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="Default: text.")
    parser.add_argument(
        "--size", type=int, default=32_000, metavar="D", help="Number of ids. Default: 32000."
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="A JSON array.")


def run(args: argparse.Namespace) -> None:
    from vllm_layerskip.config.draft_vocab import write_token_ids
    from vllm_layerskip.files.token_counts import TokenChoice, choose_tokens, coverage_table

    with needs_extra("train"):
        import transformers  # noqa: F401
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise UserError(f"--output {args.output} must be a file in a folder that exists.")
    token_ids, counts = choose_tokens(
        TokenChoice(args.model, tuple(args.corpus), args.text_field, args.size)
    )
    try:
        write_token_ids(args.output, token_ids)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}.") from None
    print(coverage_table(counts, token_ids))
    print(f"Wrote {args.output}. Use it with --draft-vocab {args.output}")
