# SPDX-License-Identifier: Apache-2.0
"""Rows of an input file, checked one by one. A bad row gets an error; the job goes on.

A row has ``prompt`` (text), ``prompt_token_ids`` or ``messages`` (a chat); optionally an ``id`` (or
``custom_id``), and ``sampling_params``. Its other columns are handed through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_layerskip.batch.parameters import merged
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.jsonl import json_value

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
ID_KEYS = ("id", "custom_id")
SUFFIXES = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class PromptRow:
    """One request, or what is wrong with it (``error``)."""

    index: int
    """Place in the input, over all files."""
    id: str | int
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Handed through to the output."""
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def input_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that paths, folders and patterns name, in a fixed order.

    Raises:
        UserError: a path names no file, or a file is of an unknown kind.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = _files_at(path)
        if not found:
            raise UserError(
                f"--input {path}: there is no such file. Give a file, a folder or a pattern of "
                f"files that end with {', '.join(SUFFIXES)}."
            )
        files += found
    for file in files:
        if file.suffix not in SUFFIXES:
            raise UserError(
                f"--input {file}: unknown kind of file. Its name must end with "
                f"{', '.join(SUFFIXES)}. Rename or convert it."
            )
    return files


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if any(letter in path.name for letter in "*?["):
        return sorted(path.parent.glob(path.name))
    return [path] if path.is_file() else []


def read_rows(files: Sequence[Path], defaults: Mapping[str, Any]) -> Iterator[PromptRow]:
    """All rows, in order.

    Args:
        defaults: sampling parameters of rows that do not set them.

    Raises:
        UserError: a file cannot be read, or two rows have one id.
    """
    seen: dict[str, int] = {}
    for index, (where, record) in enumerate(_records(files)):
        row = checked_row(index, record, defaults)
        other = seen.setdefault(json.dumps(row.id), index)
        if other != index:
            raise UserError(
                f"--input {where}: id {row.id!r} is row {other}'s, too. Ids must differ; leave "
                "them out to use row numbers."
            )
        yield row


def _records(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Each record with its place; a ValueError for a line that is no JSON."""
    for file in files:
        try:
            if file.suffix == ".parquet":
                yield from _parquet_records(file)
            else:
                yield from _json_records(file)
        except OSError as error:
            raise UserError(f"--input {file}: {error}. Give a readable file.") from None


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json_value(line, f"{file.name}, line {number}")
            except UserError as error:
                record = ValueError(str(error))
            yield f"{file}, line {number}", record


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"--input {file}: Parquet needs pyarrow. Install it (pip install pyarrow), or give "
            "JSON lines."
        ) from None
    try:
        table = parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                # Parquet has None where a row does not have a column.
                yield f"{file}, row {number}", {k: v for k, v in record.items() if v is not None}
                number += 1
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"--input {file}: this is no Parquet file ({error}).") from None


def checked_row(index: int, record: Any, defaults: Mapping[str, Any]) -> PromptRow:
    """Check a record; the row's ``error`` says what is wrong with it, if anything is."""
    if isinstance(record, ValueError):
        return PromptRow(index, index, error=str(record))
    if not isinstance(record, Mapping):
        return PromptRow(index, index, error=f"a row must be a JSON object, not {record!r:.80}.")
    own = {*PROMPT_KEYS, *ID_KEYS, "sampling_params"}
    columns = {name: value for name, value in record.items() if name not in own}
    given = next((record[key] for key in ID_KEYS if key in record), index)
    if not isinstance(given, (str, int)) or isinstance(given, bool):
        return PromptRow(index, index, columns, error=f"id={given!r} must be a text or an integer.")
    try:
        return PromptRow(
            index,
            given,
            columns,
            **_prompt(record),
            sampling_params=merged(defaults, record.get("sampling_params")),
        )
    except ValueError as error:
        return PromptRow(index, given, columns, error=str(error))


def _prompt(record: Mapping[str, Any]) -> dict[str, Any]:
    given = [key for key in PROMPT_KEYS if key in record]
    if len(given) != 1:
        what = " and ".join(given) if given else "none of them"
        raise ValueError(f"a row must have one of {', '.join(PROMPT_KEYS)}; this one has {what}.")
    (key,) = given
    value = record[key]
    if key == "prompt":
        if not isinstance(value, str) or not value:
            raise ValueError(f"prompt={value!r:.80} must be a text that is not empty.")
        return {"prompt": value}
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}={value!r:.80} must be a list that is not empty.")
    if key == "messages":
        if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
            raise ValueError("messages: each must be an object with role and content.")
        return {"messages": tuple(value)}
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise ValueError("prompt_token_ids must be integers of at least 0.")
    return {"prompt_token_ids": tuple(value)}
