# SPDX-License-Identifier: Apache-2.0
"""Choose the token ids that drafts may be: the most frequent ones of a corpus.

Give texts like those that the model will write. Every tenth passage is not counted but
held out, and the coverage is measured on it: a token that is not covered is never drafted,
and each one that the model writes ends a run of accepted drafts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_layerskip.config.draft_vocab import write_token_ids
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.jsonl import jsonl_text
from vllm_layerskip.files.text import text_files

PASSAGE_CHARS = 20_000
"""Texts are cut at line ends into passages of about this size."""
HOLD_OUT_EVERY = 10
_PASSAGES_AT_ONCE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="Folder or name of the checkpoint: its tokenizer counts."
    )
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="UTF-8 texts. Of a .jsonl file each line is a JSON string, or an object with the "
        "text in --text-field; of a folder every text file counts, hidden ones aside.",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="Default: text.")
    parser.add_argument(
        "--size", type=int, default=32_000, metavar="D", help="Number of ids. Default: 32000."
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="A JSON array.")


def run(args: argparse.Namespace) -> None:
    files = text_files(args.corpus, "--corpus")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise UserError(f"--output {args.output} must be a file in a folder that exists.")
    tokenizer, vocab_size, always = load_tokenizer(args.model)
    if not len(always) <= args.size <= vocab_size:
        raise UserError(
            f"--size {args.size} must be an integer from {len(always)} (the special tokens, "
            f"which always belong to it) to {vocab_size} (all tokens of {args.model})."
        )
    counts = count_tokens(tokenizer, vocab_size, files, args.text_field)
    token_ids = most_frequent(counts.counted, vocab_size, args.size, always)
    try:
        write_token_ids(args.output, token_ids)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}.") from None
    print(report(counts, token_ids))
    print(f"Wrote {args.output}. Use it with --draft-vocab {args.output}")


@dataclass
class TokenCounts:
    """Occurrences of each token id."""

    counted: Counter[int] = field(default_factory=Counter)
    held_out: Counter[int] = field(default_factory=Counter)
    num_passages: int = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """Add one passage."""
        held_out = self.num_passages % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        (self.held_out if held_out else self.counted).update(token_ids)
        self.num_passages += 1


def load_tokenizer(model: str) -> tuple[Any, int, list[int]]:
    """A model's tokenizer, its number of token ids, and the ids that drafts must be able to be.

    Those are the special tokens and whatever ends the model's answers.

    Raises:
        UserError: there is no such checkpoint, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {model}: no config or tokenizer could be read ({reason}). Give a folder "
            "with config.json and the tokenizer's files, or a name on the model hub."
        ) from None
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = config.eos_token_id
    vocab_size = config.get_text_config().vocab_size
    always = set(tokenizer.all_special_ids)
    always.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return tokenizer, vocab_size, sorted(token for token in always if token < vocab_size)


def count_tokens(
    tokenizer: Any, vocab_size: int, files: Sequence[Path], text_field: str
) -> TokenCounts:
    """Count every token of the files, with a progress bar on stderr.

    Raises:
        UserError: a file is no text, there are no tokens, or the tokenizer is not the model's.
    """
    from tqdm import tqdm

    counts = TokenCounts()
    sizes = [file.stat().st_size for file in files]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="Counting tokens") as progress:
        for file, size in zip(files, sizes, strict=True):
            try:
                for batch in _batches(_passages(_texts(file, text_field))):
                    for ids in tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
                        counts.add(ids)
            except UnicodeDecodeError:
                raise UserError(
                    f"--corpus {file}: this is no UTF-8 text. Convert it, or leave it out."
                ) from None
            progress.update(size)
    if not counts.counted:
        raise UserError("--corpus: there are no tokens in it. Give files that hold text.")
    largest = max(counts.counted | counts.held_out)
    if largest >= vocab_size:
        raise UserError(
            f"--model: its tokenizer yields token id {largest}, but its config.json has "
            f"vocab_size={vocab_size}. Give a checkpoint with its own tokenizer."
        )
    return counts


def _texts(file: Path, text_field: str) -> Iterator[str]:
    """Lines, or the texts of a .jsonl file; each ends with a line end."""
    with file.open(encoding="utf-8") as lines:
        if file.suffix != ".jsonl":
            yield from lines
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = jsonl_text(line, f"--corpus {file}, line {number}", text_field)
                yield text if text.endswith("\n") else f"{text}\n"


def _passages(texts: Iterator[str]) -> Iterator[str]:
    """Texts joined until they have ``PASSAGE_CHARS``."""
    parts: list[str] = []
    num_chars = 0
    for text in texts:
        parts.append(text)
        num_chars += len(text)
        if num_chars >= PASSAGE_CHARS:
            yield "".join(parts)
            parts, num_chars = [], 0
    if parts:
        yield "".join(parts)


def _batches(passages: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for passage in passages:
        batch.append(passage)
        if len(batch) == _PASSAGES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def most_frequent(
    counts: Counter[int], vocab_size: int, size: int, always: Sequence[int]
) -> list[int]:
    """``size`` token ids, the most frequent first; equally frequent ones by id.

    Args:
        counts: occurrences of each token id.
        always: ids that are among them in any case.
    """
    order = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    fixed = set(always)
    others = [token for token in order if token not in fixed][: size - len(fixed)]
    chosen = fixed.union(others)
    return [token for token in order if token in chosen]


def coverage(counts: Counter[int], token_ids: Sequence[int]) -> float | None:
    """Per cent of all occurrences that ``token_ids`` cover; None if there are none."""
    total = counts.total()
    return 100 * sum(counts[token] for token in token_ids) / total if total else None


def report(counts: TokenCounts, token_ids: Sequence[int]) -> str:
    """What a draft vocabulary of this and of smaller sizes covers."""
    num_seen = sum(counts.counted[token] > 0 for token in token_ids)
    lines = [
        f"{len(token_ids)} token ids, {num_seen} of them seen among {counts.counted.total()} "
        f"tokens of the corpus; {counts.held_out.total()} more tokens were held out.",
        f"{'ids':>8}  {'of the corpus':>14}  {'of held-out text':>16}",
    ]
    for size in sorted({max(len(token_ids) // part, 1) for part in (8, 4, 2, 1)}):
        shares = (coverage(part, token_ids[:size]) for part in (counts.counted, counts.held_out))
        seen, held_out = ("-" if share is None else f"{share:.2f} %" for share in shares)
        lines.append(f"{size:8d}  {seen:>14}  {held_out:>16}")
    return "\n".join(lines)
