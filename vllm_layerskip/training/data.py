# SPDX-License-Identifier: Apache-2.0
"""Texts, chats and prompt-response pairs as training samples of token ids and labels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import (  # type: ignore[import-untyped]
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.files.corpus import load_stdlib
from vllm_layerskip.files.jsonl import json_value
from vllm_layerskip.files.text import text_files
from vllm_layerskip.training.config import DataConfig, Source
from vllm_layerskip.training.loss import IGNORED

_VERSION = 1
"""Part of the cache's key: raise it when samples change for the same input."""
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


class Encoded(NamedTuple):
    """Token ids of a document, and labels: the same ids, or -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Records:
    """Documents as mappings, and a fingerprint that changes when they do."""

    fingerprint: str
    read: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]
    """Yields ``(where, record)``; ``where`` names file and line for errors."""


def load_samples(
    source: Source, data: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> Dataset:
    """Training samples ``{"input_ids", "labels"}``; the same input is encoded once.

    Args:
        key: of ``source`` in the YAML.

    Raises:
        UserError: the data cannot be read, or hold too little.
    """
    records = open_records(source, data, key)
    encoder = Encoder(tokenizer, data)

    def samples() -> Iterator[dict[str, np.ndarray]]:
        documents = (encoder.encode(record, where) for where, record in records.read())
        cut = pack(documents, data.seq_len) if data.packing else truncate(documents, data.seq_len)
        sample = None
        for sample in itertools.islice(cut, source.max_samples):
            # Arrow takes arrays much faster than lists.
            yield {name: np.array(ids, np.int32) for name, ids in sample._asdict().items()}
        if sample is None:
            raise _too_little(data, key)

    settings = repr(replace(data, train=source, eval=None))
    parts = (str(_VERSION), records.fingerprint, settings, tokenizer_fingerprint(tokenizer))
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    try:
        return Dataset.from_generator(samples, features=_FEATURES, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _too_little(data: DataConfig, key: str) -> UserError:
    if data.packing:
        return UserError(
            f"{key}: it holds less than data.seq_len={data.seq_len} tokens with something to train "
            "on. Give more text, or lower data.seq_len."
        )
    return UserError(f"{key}: it holds no document with something to train on. Give more text.")


def open_records(source: Source, data: DataConfig, key: str) -> Records:
    """The documents of a source, checked as far as possible without reading all of it.

    Raises:
        UserError: it cannot be read.
    """
    if source.files:
        return _open_files(source.files, data, f"{key}.files")
    if source.dataset:
        return _open_dataset(source, f"{key}.dataset")
    return _open_stdlib(source, f"{key}.python_stdlib")


def _open_files(paths: Sequence[str], data: DataConfig, key: str) -> Records:
    files = text_files(paths, key)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for file in files:
            try:
                if file.suffix == ".jsonl":
                    yield from _read_jsonl(file, data, key)
                else:
                    yield f"{key}: {file}", {data.text_field: file.read_text(encoding="utf-8")}
            except UnicodeDecodeError:
                raise UserError(
                    f"{key}: {file} is no UTF-8 text. Convert it or leave it out; for Parquet and "
                    "Arrow data use dataset."
                ) from None
            except OSError as error:
                raise UserError(f"{key}: {file}: {error.strerror}.") from None

    return Records(repr(stats), read)


def _read_jsonl(file: Path, data: DataConfig, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{key}: {file}, line {number}"
            value = json_value(line, where)
            yield where, {data.text_field: value} if isinstance(value, str) else value


def _open_dataset(source: Source, key: str) -> Records:
    name = str(source.dataset)
    split = source.split or "train"
    saved = any((Path(name) / f).is_file() for f in ("state.json", "dataset_dict.json"))
    try:
        dataset = load_from_disk(name) if saved else load_dataset(name, source.name, split=split)
        if isinstance(dataset, DatasetDict):
            dataset = dataset[split]
    except Exception as error:  # The loaders of datasets raise whatever their scripts raise.
        raise UserError(
            f"{key}: {name!r} (name {source.name!r}, split {split!r}) could not be loaded: "
            f"{first_line(error)}. Give a dataset's name on the hub, or a folder; check name and "
            "split."
        ) from None

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, record in enumerate(dataset):
            yield f"{key}: {name}, row {number}", record

    return Records(str(dataset._fingerprint), read)


def _open_stdlib(source: Source, key: str) -> Records:
    try:
        corpus = load_stdlib()
    except FileNotFoundError as error:
        raise UserError(f"{key}: {error}") from None
    texts = corpus.train if source.python_stdlib == "train" else corpus.held_out

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for name, text in sorted(texts.items()):
            yield f"{key}: {name}", {"text": text}

    return Records(f"{source.python_stdlib} {corpus.digest}", read)


class Encoder:
    """Records to token ids: a text, a chat's messages, or a prompt and its response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.tokenizer: it has no end-of-sequence token, which has to stand between "
                "documents. Set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.data = data

    def encode(self, record: Any, where: str) -> Encoded:
        """A record's token ids and labels.

        Raises:
            UserError: the record has none of the three forms, or the form lacks something.
        """
        data = self.data
        record = record if isinstance(record, Mapping) else {}
        prompt, response = record.get(data.prompt_field), record.get(data.response_field)
        if record.get(data.messages_field):
            return self._encode_chat(record[data.messages_field], where)
        if isinstance(prompt, str) and isinstance(response, str):
            return self._encode_pair(prompt, response)
        text = record.get(data.text_field, record.get("text"))
        if isinstance(text, str):
            return self._encode_text(text)
        raise UserError(
            f"{where}: there is no text in {data.text_field!r}, no list in "
            f"{data.messages_field!r}, and no texts in {data.prompt_field!r} and "
            f"{data.response_field!r}. Correct it, or name the fields with data.text_field, "
            "data.messages_field, data.prompt_field and data.response_field."
        )

    def _encode_text(self, text: str) -> Encoded:
        ids = self._with_end(self.tokenizer(text, verbose=False).input_ids)
        return Encoded(ids, list(ids))

    def _encode_pair(self, prompt: str, response: str) -> Encoded:
        before = self.tokenizer(prompt, verbose=False).input_ids
        if before and before[-1] == self.tokenizer.eos_token_id:
            before = before[:-1]  # Some tokenizers end every text by themselves.
        answer = self.tokenizer(response, add_special_tokens=False, verbose=False).input_ids
        ids = before + self._with_end(answer)
        trained_from = len(before) if self.data.loss_on == "responses" else 0
        return Encoded(ids, [IGNORED] * trained_from + ids[trained_from:])

    def _encode_chat(self, messages: Any, where: str) -> Encoded:
        tokenizer = self.tokenizer
        if not tokenizer.chat_template or not tokenizer.is_fast:
            raise UserError(
                f"{where}: chats need a fast tokenizer with a chat template, and this one is none. "
                "Name another in model.tokenizer, or use prompts and responses."
            )
        try:
            text = self._render(messages)
            spans = self._response_spans(messages, text, where)
        except UserError:
            raise
        except Exception as error:  # Templates raise their own errors on roles they don't know.
            raise UserError(
                f"{where}: the chat template refuses these messages ({error}). Each must be a "
                "mapping with role and content."
            ) from None
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(encoded.input_ids)
        labels = list(ids)
        if self.data.loss_on == "responses":
            trained = [
                any(start < end and begin <= start < stop for begin, stop in spans)
                for start, end in encoded.offset_mapping
            ]
            labels = [i if on else IGNORED for i, on in zip(ids, trained, strict=True)]
        # A template closes a response with its own token, which may be followed by a line end.
        end = tokenizer.eos_token_id
        if end not in ids[-4:]:
            ids.append(end)
            labels.append(end)
        return Encoded(ids, labels)

    def _response_spans(
        self, messages: Sequence[Mapping[str, Any]], text: str, where: str
    ) -> list[tuple[int, int]]:
        """Character ranges of what the assistant says, its closing tokens included."""
        if self.data.loss_on == "all":
            return []
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], add_generation_prompt=True) if i else ""
            after = self._render(messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"{where}: the chat template changes earlier messages when later ones follow, "
                    "so the responses cannot be told from the rest. Set data.loss_on: all, or give "
                    "chats with one response."
                )
            spans.append((len(before), len(after)))
        return spans

    def _render(self, messages: Any, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _with_end(self, ids: Sequence[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [*ids] if ids and ids[-1] == end else [*ids, end]


def pack(documents: Iterable[Encoded], seq_len: int) -> Iterator[Encoded]:
    """Blocks of exactly ``seq_len`` tokens out of one stream; the ragged end is dropped.

    A block that begins within a response goes on with it. Blocks without any label are left out.
    """
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        ids += document.input_ids
        labels += document.labels
        whole = len(ids) - len(ids) % seq_len
        for start in range(0, whole, seq_len):
            block = Encoded(ids[start : start + seq_len], labels[start : start + seq_len])
            if _has_target(block):
                yield block
        del ids[:whole], labels[:whole]


def truncate(documents: Iterable[Encoded], seq_len: int) -> Iterator[Encoded]:
    """One sample a document, of at most ``seq_len`` tokens; those without a label are left out."""
    for document in documents:
        sample = Encoded(document.input_ids[:seq_len], document.labels[:seq_len])
        if _has_target(sample):
            yield sample


def _has_target(sample: Encoded) -> bool:
    return any(label != IGNORED for label in sample.labels[1:])  # Nothing predicts the first.


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer does, whatever folder it is in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = (
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    )
    parts = (content, str(tokenizer.eos_token_id), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Collator:
    """Samples as tensors ``[B, T]``, padded to the longest if they differ in length."""

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = max(lengths)
        batch = {
            name: torch.tensor(
                [[*sample[name]] + [fill] * (longest - len(sample[name])) for sample in samples]
            )
            for name, fill in (("input_ids", self.pad_token_id), ("labels", IGNORED))
        }
        if min(lengths) < longest:
            # Only where needed: without a mask attention takes the fast, causal path.
            positions = torch.arange(longest)
            batch["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
        return batch
