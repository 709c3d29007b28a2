# SPDX-License-Identifier: Apache-2.0
"""A draft vocabulary: the token ids that may be drafted.

Drafting reads the LM head K times a step, and on a large vocabulary the head outweighs a
layer. Most text needs a fraction of the ids, so drafts can do with those rows of the head
(FR-Spec, arXiv 2502.14856). Verification uses the whole head, so the output stays exact. A token
outside of the draft vocabulary is never drafted, which costs only a rejection.

A file holds the ids as text: a JSON array, or one id a line. Nothing is ever unpickled.
This module imports neither vLLM nor torch.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_layerskip.files.whole import write_json

MAX_FILE_BYTES = 32 << 20
"""More than any vocabulary needs; weights given by mistake are not read into memory."""

REMEDY = (
    "Make a file of token ids with 'vllm-layerskip draft-vocab', or draft from the whole "
    "vocabulary with draft_vocab='none'."
)


@dataclass(frozen=True)
class DraftVocab:
    """Checked token ids."""

    source: str
    """Where they came from, for messages."""
    token_ids: tuple[int, ...]
    """Ascending, without duplicates, each from 0 to the vocabulary's size - 1."""

    def __len__(self) -> int:
        return len(self.token_ids)


def read_draft_vocab(path: Path, source: str, vocab_size: int) -> DraftVocab:
    """Read and check a file of token ids.

    Args:
        path: the file.
        source: the option and value that named it; begins every error message.
        vocab_size: V, the number of token ids of the model.

    Raises:
        ValueError: the file cannot be read, or is no list of ids of this vocabulary; the
            message says what to do.
    """
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            # Reading a pipe would block; a device would never end.
            raise ValueError(f"{source}: this is no regular file. Correct the path. {REMEDY}")
        num_bytes = status.st_size
        if num_bytes > MAX_FILE_BYTES:
            raise ValueError(
                f"{source}: the file has {num_bytes} bytes, at most {MAX_FILE_BYTES} are read. "
                f"It must be a JSON array of token ids, or one id a line. {REMEDY}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{source}: the file cannot be read ({error.strerror or error}). Correct the path. "
            f"{REMEDY}"
        ) from None
    return parse_draft_vocab(content, source, vocab_size)


def parse_draft_vocab(content: bytes, source: str, vocab_size: int) -> DraftVocab:
    """``read_draft_vocab`` for a file's content."""
    token_ids = _parse(content, source)
    problem = _problem(token_ids, vocab_size)
    if problem is not None:
        raise ValueError(f"{source}: {problem} {REMEDY}")
    return DraftVocab(source, tuple(sorted(token_ids)))


def write_token_ids(path: Path, token_ids: Sequence[int]) -> None:
    """Write a JSON array, whole or not at all.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    write_json(path, list(token_ids), indent=None)


def _parse(content: bytes, source: str) -> list[int]:
    wanted = f"It must be a JSON array of token ids, or one id a line. {REMEDY}"
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{source}: the file is no text. {wanted}") from None
    if not text.startswith(("[", "{", '"')):
        return [_parse_line(line, number, source) for number, line in _filled_lines(text)]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: the file is no valid JSON ({error}). {wanted}") from None
    if not isinstance(values, list):
        raise ValueError(f"{source}: the file holds no JSON array. {wanted}")
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{source}: entry {position} is {_short(value)}, no integer. {wanted}")
    return values


def _filled_lines(text: str) -> list[tuple[int, str]]:
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return [(number, line) for number, line in lines if line]


def _parse_line(line: str, number: int, source: str) -> int:
    # int() would take "1_000" and digits of other scripts too.
    digits = line.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise ValueError(
            f"{source}: line {number} is {_short(line)}, no integer. It must be a JSON array "
            f"of token ids, or one id a line. {REMEDY}"
        )
    return int(line)


def _problem(token_ids: Sequence[int], vocab_size: int) -> str | None:
    if not token_ids:
        return "the file holds no token id."
    outside = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        return (
            f"token id {outside} is not in the model's vocabulary, which has ids 0 to "
            f"{vocab_size - 1}. Use a file made for this model's tokenizer."
        )
    seen: set[int] = set()
    for token in token_ids:
        if token in seen:
            return f"token id {token} is there more than once. List every id once."
        seen.add(token)
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
