# SPDX-License-Identifier: Apache-2.0
"""Held-out text as windows of token ids.

Documents are joined to one stream of tokens, each followed by the tokenizer's end-of-sequence
token, if it has one. Windows of T tokens start every S tokens of the stream (the stride). A token
counts in the first window that holds it, so none counts twice. With S = T the first token of each
window has nothing before it and does not count. With S < T every token but the stream's first
counts, with at least T - S tokens before it (except in the first window).

``bos`` says where the beginning-of-sequence token stands: before each document, at the head of
each window (every token of text then counts), or nowhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.settings import BeginOfSequence
from vllm_layerskip.files.corpus import load_stdlib
from vllm_layerskip.files.found import record_files
from vllm_layerskip.files.records import good_records, text_of

STDLIB = "stdlib"
OPTION = "--data"


class Document(NamedTuple):
    name: str
    text: str


@dataclass(frozen=True)
class EncodedText:
    """A stream of token ids and where it came from."""

    token_ids: Sequence[int]
    num_documents: int
    num_bytes: int
    sha256: str
    """Over the texts, each followed by a zero byte."""


class Windows(NamedTuple):
    token_ids: torch.Tensor
    """``[W, T]``; the last window is padded with zeros."""
    scored: torch.Tensor
    """``[W, T]`` booleans: the tokens that count."""

    @property
    def num_scored_tokens(self) -> int:
        return int(self.scored.sum())


def read_documents(sources: Sequence[str], text_field: str) -> list[Document]:
    """Text files, the records of other files (``files.records``), or ``stdlib``.

    Raises:
        UserError: a source does not exist or cannot be read, or there is no text at all.
    """
    documents = [
        document
        for source in sources
        for document in (
            _held_out_modules() if source == STDLIB else _read_files(source, text_field)
        )
        if document.text.strip()
    ]
    if not documents:
        raise UserError(f"{OPTION} {' '.join(sources)}: there is no text in it.")
    return documents


def _held_out_modules() -> Iterator[Document]:
    try:
        held_out = load_stdlib().held_out
    except FileNotFoundError as error:
        raise UserError(f"{OPTION} {STDLIB}: {error}") from None
    for name in sorted(held_out):
        yield Document(name, held_out[name])


def _read_files(source: str, text_field: str) -> Iterator[Document]:
    for record in good_records(record_files([source], OPTION), OPTION, text="document"):
        yield Document(record.where, text_of(record, OPTION, text_field))


def encode(
    tokenizer: Any,
    documents: Iterable[Document],
    bos: BeginOfSequence,
    max_tokens: int | None = None,
) -> EncodedText:
    """Documents as one stream of token ids.

    Args:
        max_tokens: end the stream there; whole documents after it do not count as read.
    """
    head = [tokenizer.bos_token_id] if bos == "document" else []
    tail = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    token_ids: list[int] = []
    digest = hashlib.sha256()
    num_documents = num_bytes = 0
    for text, ids in _tokenized(tokenizer, documents):
        content = text.encode()
        digest.update(content + b"\0")
        num_documents += 1
        num_bytes += len(content)
        token_ids += [*head, *ids, *tail]
        if max_tokens is not None and len(token_ids) >= max_tokens:
            token_ids = token_ids[:max_tokens]
            break
    return EncodedText(token_ids, num_documents, num_bytes, digest.hexdigest())


def _tokenized(
    tokenizer: Any, documents: Iterable[Document], batch_size: int = 64
) -> Iterator[tuple[str, list[int]]]:
    """Texts and their token ids; fast tokenizers encode a batch on all cores."""
    remaining = iter(documents)
    while texts := [document.text for document in islice(remaining, batch_size)]:
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip(texts, encoded, strict=True)


def cut_windows(
    token_ids: Sequence[int], seq_len: int, stride: int, window_bos: int | None = None
) -> Windows:
    """Windows of ``seq_len`` tokens of a stream; no more of them than are needed.

    Args:
        stride: tokens of the stream from one window's start to the next one's.
        window_bos: token id that heads each window, and is one of its ``seq_len``.
    """
    head = [] if window_bos is None else [window_bos]
    length = seq_len - len(head)
    num_tokens = len(token_ids)
    num_windows = 1 + max(0, -(-(num_tokens - length) // stride))
    windows = torch.zeros(num_windows, seq_len, dtype=torch.long)
    scored = torch.zeros(num_windows, seq_len, dtype=torch.bool)
    end = 0  # Of the tokens that earlier windows hold.
    for index in range(num_windows):
        start = index * stride
        ids = [*head, *token_ids[start : start + length]]
        windows[index, : len(ids)] = torch.tensor(ids)
        scored[index, max(len(head) + end - start, 1) : len(ids)] = True
        end = min(start + length, num_tokens)
    return Windows(windows, scored)
