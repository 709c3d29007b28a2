# SPDX-License-Identifier: Apache-2.0
"""The most frequent tokens of a corpus, for a draft vocabulary.

Every tenth passage is not counted but held out, to measure how much text the chosen tokens cover.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.files.found import record_files
from vllm_layerskip.files.records import good_records, is_text_file, text_lines, text_of
from vllm_layerskip.files.tokenizers import load_tokenizer, stop_token_ids
from vllm_layerskip.files.unreadable import unreadable

PASSAGE_CHARS = 20_000
"""Texts are cut at line ends into passages of about this size."""
HOLD_OUT_EVERY = 10
_PASSAGES_AT_ONCE = 64


@dataclass(frozen=True)
class TokenChoice:
    """Which tokens to choose: the ``size`` most frequent ones of a corpus."""

    model: str
    """Folder or name of the checkpoint whose tokenizer counts."""
    corpus: Sequence[str | Path]
    """Files, folders and patterns."""
    text_field: str = "text"
    """The key of a text in an object or a table."""
    size: int = 32_000


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a model."""

    tokenizer: Any
    size: int
    """The number of token ids."""
    always: Sequence[int]
    """Ids that every draft vocabulary needs: special tokens, and those that end an answer."""


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


def choose_tokens(choice: TokenChoice) -> tuple[list[int], TokenCounts]:
    """Count a corpus and choose the most frequent tokens, with a progress bar on stderr.

    Returns:
        Token ids, the most frequent first, and the counts.

    Raises:
        UserError: a setting is wrong, or a file cannot be read; the message names the option.
    """
    files = record_files(choice.corpus, "--corpus")
    vocabulary = load_vocabulary(choice.model)
    num_always = len(vocabulary.always)
    if not num_always <= choice.size <= vocabulary.size:
        raise UserError(
            f"--size {choice.size} must be an integer from {num_always} (the special tokens, "
            f"which always belong to it) to {vocabulary.size} (all tokens of {choice.model})."
        )
    counts = count_tokens(vocabulary, files, choice.text_field)
    return most_frequent(counts.counted, vocabulary, choice.size), counts


def load_vocabulary(model: str) -> Vocabulary:
    """Read a checkpoint's tokenizer, and what its config says about tokens.

    Raises:
        UserError: there is no such checkpoint, or it has no tokenizer.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except unreadable() as error:
        raise UserError(
            f"--model {model}: no config could be read ({first_line(error)}). Give a folder with "
            "config.json and the tokenizer's files, or a name on the model hub."
        ) from None
    tokenizer = load_tokenizer(model, "--model")
    size = config.get_text_config().vocab_size
    always = {*tokenizer.all_special_ids, *stop_token_ids(model, config.eos_token_id)}
    return Vocabulary(tokenizer, size, sorted(token for token in always if token < size))


def count_tokens(vocabulary: Vocabulary, files: Sequence[Path], text_field: str) -> TokenCounts:
    """Count every token of the files, with a progress bar on stderr.

    Raises:
        UserError: a file is no text, there are no tokens, or the tokenizer is not the model's.
    """
    from tqdm import tqdm

    counts = TokenCounts()
    sizes = [file.stat().st_size for file in files]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="Counting tokens") as progress:
        for file, size in zip(files, sizes, strict=True):
            for token_ids in _tokenized_passages(vocabulary.tokenizer, file, text_field):
                counts.add(token_ids)
            progress.update(size)
    if not counts.counted:
        raise UserError("--corpus: there are no tokens in it. Give files that hold text.")
    largest = max(counts.counted | counts.held_out)
    if largest >= vocabulary.size:
        raise UserError(
            f"--model: its tokenizer yields token id {largest}, but its config.json has "
            f"vocab_size={vocabulary.size}. Give a checkpoint with its own tokenizer."
        )
    return counts


def _tokenized_passages(tokenizer: Any, file: Path, text_field: str) -> Iterator[list[int]]:
    for batch in _batches(_passages(_texts(file, text_field))):
        yield from tokenizer(batch, add_special_tokens=False, verbose=False).input_ids


def _texts(file: Path, text_field: str) -> Iterator[str]:
    """The lines of a text file, or the texts of its records; each ends with a line end."""
    if is_text_file(file):
        yield from text_lines(file, "--corpus")
        return
    for record in good_records([file], "--corpus", text="document"):
        text = text_of(record, "--corpus", text_field)
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
    while batch := list(islice(passages, _PASSAGES_AT_ONCE)):
        yield batch


def most_frequent(counts: Counter[int], vocabulary: Vocabulary, size: int) -> list[int]:
    """``size`` token ids, the most frequent first; equally frequent ones by id.

    Args:
        counts: occurrences of each token id.
        vocabulary: its ``always`` are among them in any case.
    """
    order = sorted(range(vocabulary.size), key=lambda token: (-counts[token], token))
    fixed = set(vocabulary.always)
    others = [token for token in order if token not in fixed][: size - len(fixed)]
    chosen = fixed.union(others)
    return [token for token in order if token in chosen]


def coverage(counts: Counter[int], token_ids: Sequence[int]) -> float | None:
    """Per cent of all occurrences that ``token_ids`` cover; None if there are none."""
    total = counts.total()
    return 100 * sum(counts[token] for token in token_ids) / total if total else None


def coverage_table(counts: TokenCounts, token_ids: Sequence[int]) -> str:
    """How much text a draft vocabulary of this and of smaller sizes covers."""
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
    if not counts.held_out.total():
        lines.append(
            f"No text is held out: of each {HOLD_OUT_EVERY} passages of {PASSAGE_CHARS} characters "
            f"one is, and the corpus has {counts.num_passages}. Give more text to measure "
            "coverage of text that was not counted."
        )
    return "\n".join(lines)
