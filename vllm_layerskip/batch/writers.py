# SPDX-License-Identifier: Apache-2.0
"""The output file. Its writer sees all columns that are handed through before an engine starts, and
refuses what it could not write: no answer is lost to a value that has no form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_layerskip.batch.kinds import Kind, arrow_type, arrow_value, joined, kind_of
from vllm_layerskip.batch.output import Answer, json_line
from vllm_layerskip.batch.values import brief, json_form, texts_in
from vllm_layerskip.files.found import format_of
from vllm_layerskip.files.records import NO_UNICODE, is_unicode, parquet_file
from vllm_layerskip.files.whole import whole_file

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 1024


class Writer(Protocol):
    """Writes an output file, after it has seen the columns of all rows."""

    def see(self, columns: Mapping[str, Any]) -> None:
        """Take in what a row hands through.

        Raises:
            ValueError: a value cannot be written; the message names the column.
        """

    def write(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write all records, whole or not at all."""


def writer_of(path: Path, files: Sequence[Path], with_token_ids: bool) -> Writer:
    """The writer of an output file, by the name's ending.

    Args:
        files: the input.
    """
    if path.suffix == ".parquet":
        return ParquetWriter(_types_in(files), with_token_ids)
    return JsonLinesWriter()


def output_record(
    row_id: str | int, columns: Mapping[str, Any], answer: Answer, with_token_ids: bool
) -> dict[str, Any]:
    """A row of the output. Our columns replace the input's columns of the same names."""
    record = {
        **columns,
        "id": row_id,
        "text": _unicode(answer.text),
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_output_tokens": None if answer.token_ids is None else len(answer.token_ids),
        "error": _unicode(answer.error),
    }
    if with_token_ids:
        record["token_ids"] = None if answer.token_ids is None else list(answer.token_ids)
    return record


def own_columns(with_token_ids: bool) -> list[str]:
    """The names of the columns that are not handed through."""
    return list(output_record(0, {}, Answer(0), with_token_ids))


def _unicode(text: str | None) -> str | None:
    """A text that UTF-8 can hold: half of a surrogate pair becomes its escape."""
    return None if text is None else text.encode(errors="backslashreplace").decode()


class JsonLinesWriter:
    """JSON lines. What JSON does not have becomes a text: NaN, times, bytes and others."""

    def see(self, columns: Mapping[str, Any]) -> None:
        for name, value in columns.items():
            _form(name, value)

    def write(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        with whole_file(path) as draft, draft.open("wb") as lines:
            for record in records:
                lines.write(json_line({name: _form(name, v) for name, v in record.items()}))


class ParquetWriter:
    """Parquet. A column has the type that it has in the input, or one that its values share."""

    def __init__(self, types: Mapping[str, pyarrow.DataType], with_token_ids: bool) -> None:
        """
        Args:
            types: of columns in the input. A column that does not take its own values back gets
                another one.
        """
        self._own = own_columns(with_token_ids)
        self._types = {name: type_ for name, type_ in types.items() if name not in self._own}
        self._unchecked: dict[str, list[Any]] = {name: [] for name in self._types}
        self._kinds: dict[str, Kind] = {}

    def see(self, columns: Mapping[str, Any]) -> None:
        for name, value in columns.items():
            kind = kind_of(_utf8_form(name, value))
            self._kinds[name] = joined(self._kinds.get(name, "null"), kind)
            if name in self._types:
                self._unchecked[name].append(value)
                self._check_type(name, _ROWS_AT_ONCE)

    def _check_type(self, name: str, num_values: int) -> None:
        import pyarrow

        values = self._unchecked[name]
        if name not in self._types or len(values) < num_values:
            return
        try:
            pyarrow.array(values, self._types[name])
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            del self._types[name]
        values.clear()

    def write(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        import pyarrow
        from pyarrow import parquet

        for name in self._unchecked:
            self._check_type(name, 1)
        schema = self._schema()
        with whole_file(path) as draft, parquet.ParquetWriter(draft, schema) as file:
            for batch in _batches(records):
                arrays = [
                    pyarrow.array([self._value(f.name, r.get(f.name)) for r in batch], f.type)
                    for f in schema
                ]
                file.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

    def _schema(self) -> pyarrow.Schema:
        import pyarrow

        integer, text = pyarrow.int64(), pyarrow.string()
        own = {
            "id": integer, "text": text, "finish_reason": text, "num_prompt_tokens": integer,
            "num_output_tokens": integer, "error": text, "token_ids": pyarrow.list_(integer),
        }  # fmt: skip
        seen = {
            name: self._types[name] if name in self._types else arrow_type(kind)
            for name, kind in self._kinds.items()
        }
        passed = {name: type_ for name, type_ in seen.items() if name not in own}
        return pyarrow.schema(passed | {name: seen.get(name, own[name]) for name in self._own})

    def _value(self, name: str, value: Any) -> Any:
        if name in self._types or name not in self._kinds:
            return value
        return arrow_value(json_form(value, finite=False), self._kinds[name])


def _form(name: str, value: Any) -> Any:
    try:
        return json_form(value)
    except ValueError as error:
        raise ValueError(f"column {brief(name)}: {error} Leave it out.") from None


def _utf8_form(name: str, value: Any) -> Any:
    """The form of a value of Parquet; its texts are in UTF-8, and so are the names."""
    try:
        form = json_form(value, finite=False)
    except ValueError as error:
        raise ValueError(f"column {brief(name)}: {error} Leave it out.") from None
    if not is_unicode(name) or not all(map(is_unicode, texts_in(form))):
        raise ValueError(
            f"column {brief(name)}: {NO_UNICODE} Or choose --output-format jsonl, which can "
            "escape it."
        )
    return form


def _types_in(files: Sequence[Path]) -> dict[str, pyarrow.DataType]:
    """The types of columns that are the same in all files, if all are tables.

    Raises:
        UserError: a file cannot be read.
    """
    if not all(format_of(file) == ".parquet" for file in files):
        return {}
    types: dict[str, pyarrow.DataType | None] = {}
    for file in files:
        with parquet_file(file, "--input") as table:
            for column in table.schema_arrow:
                if types.setdefault(column.name, column.type) != column.type:
                    types[column.name] = None
    return {name: type_ for name, type_ in types.items() if type_ is not None}


def _batches(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    left = iter(records)
    while batch := list(islice(left, _ROWS_AT_ONCE)):
        yield batch
