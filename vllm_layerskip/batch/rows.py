# SPDX-License-Identifier: Apache-2.0
"""Rows of the input, checked one by one. A bad row gets an error; the job goes on.

A row has ``prompt`` (text), ``prompt_token_ids`` or ``messages`` (a chat, with ``tools`` if it has
some); optionally an ``id`` (or ``custom_id``), and ``sampling_params``. Of these, null is "not
given": a table has nulls where a row lacks what others have. Other columns are handed through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_layerskip.batch import openai
from vllm_layerskip.batch.parameters import merged
from vllm_layerskip.batch.values import brief, texts_in
from vllm_layerskip.chats.messages import template_tools
from vllm_layerskip.files.records import (
    NO_UNICODE,
    Record,
    is_unicode,
    read_records,
    without_nulls,
)

TEXT_FIELD = "prompt"
"""The column of texts, unless another one is named."""
_OTHER_PROMPTS = ("prompt_token_ids", "messages")
_ID_KEYS = ("id", "custom_id")
OWN_COLUMNS = (*_OTHER_PROMPTS, *_ID_KEYS, "sampling_params", "tools")
"""Columns that cannot be that of the texts."""
_MAX_TOKEN_ID = 2**31 - 1
"""Engines hold ids in 32 bits; vLLM itself checks them against the vocabulary."""


@dataclass(frozen=True)
class PromptRow:
    """One request, or what is wrong with it (``error``)."""

    index: int
    """Place in the input, over all files."""
    id: str | int | None = None
    """None if the row has none of its own."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Handed through to the output."""
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: Any = None
    """Of a chat, as ``chats.chat`` takes them; they are among the columns, too."""
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    where: str = ""
    """File, and place in it, for messages."""


def read_rows(
    files: Sequence[Path], defaults: Mapping[str, Any], text_field: str = TEXT_FIELD
) -> Iterator[PromptRow]:
    """All rows, in order.

    Args:
        files: those of ``record_files``.
        defaults: sampling parameters of rows that do not set them.
        text_field: the column of texts.

    Raises:
        UserError: a file cannot be read.
    """
    for index, record in enumerate(read_records(files, "--input", "lines")):
        yield checked_row(index, record, defaults, text_field)


def checked_row(
    index: int, record: Record, defaults: Mapping[str, Any], text_field: str = TEXT_FIELD
) -> PromptRow:
    """Check a record; the row's ``error`` says what is wrong with it, if anything is."""
    where, value = record.where, record.value
    if record.error is not None:
        return PromptRow(index, error=f"{where}: {record.error}", where=where)
    if isinstance(value, str):
        value = {text_field: value}
    if not isinstance(value, Mapping):
        error = f"a row must be a JSON object or a text, not {brief(value)}."
        return PromptRow(index, error=error, where=where)
    if record.is_row:
        own = (*_ID_KEYS, "sampling_params")
        value = {**value, **{key: _without_nan(value[key]) for key in own if key in value}}
    values: dict[str, Any] = {"where": where}
    source = "sampling_params"
    try:
        values["id"] = _id(value)
        if openai.is_request(value) and not _given(value, text_field):
            value, source = openai.row_of(value, text_field), "body"
        values |= _prompt(value, text_field, record.is_row)
        values["sampling_params"] = merged(defaults, _own(value, "sampling_params"), source)
    except ValueError as error:
        values["error"] = str(error)
    return PromptRow(index, columns=_columns(value, text_field), **values)


def _without_nan(value: Any) -> Any:
    """Numbers as they were before pandas wrote a table: it has NaN where an integer is missing, and
    floats beside it."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, list) else value


def _given(record: Mapping[str, Any], text_field: str) -> list[str]:
    """The columns that hold a prompt."""
    return [key for key in (text_field, *_OTHER_PROMPTS) if record.get(key) is not None]


def _columns(record: Mapping[str, Any], text_field: str) -> dict[str, Any]:
    # With both ids given, the second one is a column as any other.
    ids = set(_ID_KEYS) - set(_id_keys(record)[1:])
    own = {text_field, *_OTHER_PROMPTS, "sampling_params", *ids}
    return {name: value for name, value in record.items() if name not in own}


def _own(record: Mapping[str, Any], key: str) -> Any:
    """A value that the program reads, without nulls; None if it is not given.

    Raises:
        ValueError: it nests too deeply, or a text of it is none that UTF-8 can hold.
    """
    return without_nulls(_valid(record, key))


def _valid(record: Mapping[str, Any], key: str) -> Any:
    value = record.get(key)
    try:
        valid = all(map(is_unicode, texts_in(value)))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not valid:
        raise ValueError(f"{key}: {NO_UNICODE}")
    return value


def _id_keys(record: Mapping[str, Any]) -> list[str]:
    return [key for key in _ID_KEYS if record.get(key) is not None]


def _id(record: Mapping[str, Any]) -> str | int | None:
    for key in _id_keys(record):
        given = record[key]
        if not isinstance(given, str | int) or isinstance(given, bool):
            raise ValueError(f"{key}={brief(given)} must be a text or an integer.")
        return given
    return None


def _prompt(record: Mapping[str, Any], text_field: str, is_row: bool) -> dict[str, Any]:
    given = _given(record, text_field)
    if len(given) != 1:
        valid = ", ".join((text_field, *_OTHER_PROMPTS))
        what = " and ".join(given) if given else "none of them"
        raise ValueError(f"a row must have one of {valid}; this one has {what}.")
    (key,) = given
    value = _own(record, key)
    if key == text_field:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{key}={brief(value)} must be a text that is not empty.")
        return {"prompt": value}
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}={brief(value)} must be a list that is not empty.")
    if key == "messages":
        return {"messages": _messages(value), "tools": _tools(record, is_row)}
    if not all(map(_is_token_id, value)):
        raise ValueError(f"prompt_token_ids must be integers from 0 to {_MAX_TOKEN_ID}.")
    return {"prompt_token_ids": tuple(value)}


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKEN_ID


def _messages(value: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        raise ValueError("messages: each must be an object with role and content.")
    return tuple(value)


def _tools(record: Mapping[str, Any], is_row: bool) -> Any:
    # In JSON a null may be meant: a tool's default.
    tools = _own(record, "tools") if is_row else _valid(record, "tools")
    template_tools(tools)
    return tools or None
