# SPDX-License-Identifier: Apache-2.0
"""Where training texts come from: files, a dataset, or Python's standard library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (  # type: ignore[import-untyped]
    DatasetDict,
    load_dataset,
    load_from_disk,
)

from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.files.corpus import load_stdlib
from vllm_layerskip.files.found import format_of, record_files
from vllm_layerskip.files.records import good_records, without_nulls
from vllm_layerskip.training.config import DataConfig, Source


@dataclass(frozen=True)
class Records:
    """Documents as mappings, and a fingerprint that changes when they do."""

    fingerprint: str
    read: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]
    """Yields ``(where, record)``; ``where`` names file and line for errors."""


def open_records(source: Source, data: DataConfig, key: str) -> Records:
    """The documents of a source, checked as far as possible without reading all of it.

    Raises:
        UserError: it cannot be read.
    """
    if source.files:
        return _open_files(source.files, data, f"{key}.files")
    if source.dataset and format_of(Path(source.dataset)) and Path(source.dataset).is_file():
        return _open_dataset_file(source, source.dataset, data, f"{key}.dataset")
    if source.dataset:
        return _open_dataset(source, f"{key}.dataset")
    return _open_stdlib(source, f"{key}.python_stdlib")


def _open_files(paths: Sequence[str], data: DataConfig, key: str) -> Records:
    files = record_files(paths, key)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for record in good_records(files, f"{key}:", text="document"):
            value = without_nulls(record.value) if record.is_row else record.value
            fields = {data.text_field: value} if isinstance(value, str) else value
            yield f"{key}: {record.where}", fields

    return Records(repr(stats), read)


def _open_dataset_file(source: Source, file: str, data: DataConfig, key: str) -> Records:
    if source.name or source.split not in (None, "train"):
        raise UserError(
            f"{key}: {file} is one file, which has no name={source.name!r} and no "
            f"split={source.split!r}. Leave them out."
        )
    return _open_files([file], data, key)


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
            yield f"{key}: {name}, row {number}", without_nulls(record)

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
