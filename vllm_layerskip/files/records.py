# SPDX-License-Identifier: Apache-2.0
"""Prompts and texts out of files: the one reader of ``train``, ``eval``, ``tune``, ``generate`` and
``draft-vocab``.

Files are UTF-8, with or without a byte order mark. Lines end at a line feed only: U+2028 and other
separators of Unicode are text, and JSON allows them inside of a string.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.found import JSON_LINES, TEXT, format_of, is_gzipped

_PARQUET_ROWS_AT_ONCE = 1024


class Record(NamedTuple):
    """A line, an entry of an array, a row of a table or a whole text."""

    where: str
    """File, and place in it, for messages."""
    value: Any = None
    """What JSON or Parquet holds there, or a text."""
    error: str | None = None
    """Why a line cannot be read; the lines after it can."""
    is_row: bool = False
    """Of a table, where a null may stand for a key that is not there (``without_nulls``)."""


def read_records(
    files: Iterable[Path], source: str, text: Literal["document", "lines"]
) -> Iterator[Record]:
    """What files hold, in order.

    Args:
        files: of known formats (``record_files``).
        source: the option or key that names the files, for messages.
        text: whether a text file is one document, or each of its lines is a record.

    Raises:
        UserError: a file cannot be read, or is damaged as a whole.
    """
    for file in files:
        kind = format_of(file)
        if kind == ".parquet":
            yield from _parquet_records(file, source)
        elif kind in JSON_LINES:
            yield from _json_lines(file, source)
        elif kind == ".json":
            yield from _json_records(file, source)
        elif text == "document":
            yield Record(str(file), read_text(file, source))
        else:
            yield from _text_lines(file, source)


def good_records(
    files: Iterable[Path], source: str, text: Literal["document", "lines"]
) -> Iterator[Record]:
    """``read_records``, where a line that cannot be read is an error.

    Raises:
        UserError: also for such a line.
    """
    for record in read_records(files, source, text):
        if record.error is not None:
            raise UserError(f"{source} {record.where}: {record.error}")
        yield record


def text_lines(file: Path, source: str) -> Iterator[str]:
    """The lines of a text file with their ends, for files that are too large for memory.

    Raises:
        UserError: the file cannot be read, or is no UTF-8 text.
    """
    for number, line in _lines(file, source):
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{source} {file}, line {number}: {_NO_UTF_8}") from None


def is_text_file(file: Path) -> bool:
    return format_of(file) in TEXT


def read_text(file: Path, source: str) -> str:
    """The whole text of a file, its lines ended by ``\\n``.

    Raises:
        UserError: the file cannot be read, or is no UTF-8 text.
    """
    with _readable(file, source), _open(file) as content:
        data = content.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source} {file}: {_NO_UTF_8}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_of(record: Record, source: str, text_field: str) -> str:
    """The text of a record: a string, or the string in its ``text_field``.

    Raises:
        UserError: there is none, or it is no valid text.
    """
    value = record.value
    text = value.get(text_field) if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise UserError(
            f"{source} {record.where}: there is no text. It must be a string, or an object with "
            f"the text in {text_field!r} (name another with --text-field)."
        )
    if not is_unicode(text):
        column = f"{text_field}: " if isinstance(value, Mapping) else ""
        raise UserError(f"{source} {record.where}: {column}{NO_UNICODE}")
    return text


NO_UNICODE = (
    "the text has half of a surrogate pair (such as \\ud83d), which is no character. Correct the "
    "text, or write it as UTF-8."
)
"""For a text that JSON can escape, but no tokenizer takes."""


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_value(line: str) -> Any:
    """The value of a line.

    Raises:
        ValueError: the line is no JSON; the message says why.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is no JSON ({error}). Correct the line.") from None


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at every depth.

    A table has a null where a row lacks a key that other rows have.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(part) for part in value]
    return value


_NO_UTF_8 = "this is no UTF-8 text. Convert it, or leave it out."


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if is_gzipped(file) else file.open("rb")


@contextmanager
def _readable(file: Path, source: str) -> Iterator[None]:
    """Turn what goes wrong with a file into an error that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source} {file}: {reason}. Give a readable file.") from None


def _lines(file: Path, source: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without a byte order mark."""
    with _readable(file, source), _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _filled_lines(file: Path, source: str) -> Iterator[tuple[str, str | None]]:
    """The place and text of each line that is not blank; None if it is no UTF-8."""
    for number, line in _lines(file, source):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                yield where, line.decode()
            except UnicodeDecodeError:
                yield where, None


def _text_lines(file: Path, source: str) -> Iterator[Record]:
    for where, line in _filled_lines(file, source):
        if line is None:
            yield Record(where, error=_NO_UTF_8)
        else:
            yield Record(where, line.removesuffix("\n").removesuffix("\r"))


def _json_lines(file: Path, source: str) -> Iterator[Record]:
    for where, line in _filled_lines(file, source):
        if line is None:
            yield Record(where, error=_NO_UTF_8)
            continue
        try:
            yield Record(where, json_value(line))
        except ValueError as error:
            yield Record(where, error=str(error))


def _json_records(file: Path, source: str) -> Iterator[Record]:
    """The entries of an array, one value, or JSON lines under another name."""
    try:
        value = json.loads(read_text(file, source))
    except (ValueError, RecursionError) as error:
        lines = list(_json_lines(file, source))
        if len(lines) < 2 or lines[0].error is not None:
            raise UserError(f"{source} {file}: this is no JSON ({error}). Correct it.") from None
        yield from lines
        return
    if isinstance(value, list):
        for number, entry in enumerate(value, start=1):
            yield Record(f"{file}, entry {number}", entry)
    else:
        yield Record(str(file), value)


@contextmanager
def parquet_file(file: Path, source: str) -> Iterator[Any]:
    """A Parquet file as pyarrow's ``ParquetFile``.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read; also within the block.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{source} {file}: Parquet needs pyarrow. Install it (pip install pyarrow), or give "
            "JSON lines."
        ) from None
    try:
        with _readable(file, source), parquet.ParquetFile(file) as table:
            yield table
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{source} {file}: this is no Parquet file that can be read ({error}). Write it again."
        ) from None


def _parquet_records(file: Path, source: str) -> Iterator[Record]:
    number = 0
    with parquet_file(file, source) as table:
        names = table.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"{source} {file}: it has several columns of the name {twice[0]!r}. Rename or drop "
                "all but one."
            )
        for batch in table.iter_batches(_PARQUET_ROWS_AT_ONCE):
            columns = {
                name: _python_values(column, f"{source} {file}, column {name!r}", number)
                for name, column in zip(names, batch.columns, strict=True)
            }
            for index in range(batch.num_rows):
                number += 1
                value = {name: column[index] for name, column in columns.items()}
                yield Record(f"{file}, row {number}", value, is_row=True)


_UNREADABLE = (ValueError, OverflowError, KeyError)
"""Errors of values that Python does not have; pyarrow's ``ArrowInvalid`` is a ValueError."""


def _python_values(column: Any, where: str, num_rows_before: int) -> list[Any]:
    """The values of a column, none of them changed.

    Raises:
        UserError: Python has no such value (a date after the year 9999, a time's nanoseconds).
    """
    try:
        return _exact_values(column)
    except _UNREADABLE as error:
        row = num_rows_before + 1 + next((i for i in range(len(column)) if _is_wrong(column, i)), 0)
        raise UserError(
            f"{where}, row {row}: this value cannot be read ({error}). Change it, or leave the "
            "column out."
        ) from None


def _exact_values(column: Any) -> list[Any]:
    import pyarrow

    if column.type == pyarrow.time64("ns"):
        column = column.cast(pyarrow.time64("us"))  # Else nanoseconds are dropped.
    return list(column.to_pylist())


def _is_wrong(column: Any, index: int) -> bool:
    try:
        _exact_values(column.slice(index, 1))
    except _UNREADABLE:
        return True
    return False
