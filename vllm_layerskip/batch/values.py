# SPDX-License-Identifier: Apache-2.0
"""The forms that values of a row take in the output: those of JSON, from whatever JSON or Parquet
can hold."""

from __future__ import annotations

import math
import reprlib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

MAX_DEPTH = 64
"""Levels of lists and objects. Python's own JSON fails at some hundreds, and not always at the same
number."""

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 80, 80, 40


def brief(value: object) -> str:
    """A value for messages, cut if it is long or deep."""
    return _short.repr(value)


def json_form(value: Any, *, finite: bool = True) -> Any:
    """A value as JSON has it.

    Args:
        finite: whether NaN and the infinities become texts, since JSON has no numbers for them.

    Raises:
        ValueError: it has no form, or too many levels.
    """
    return _form(value, finite, MAX_DEPTH)


def _form(value: Any, finite: bool, levels: int) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else _number_text(value)
    if (text := _text(value)) is not None:
        return text
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers.
        return _form(value.tolist(), finite, levels)
    if levels == 0:
        raise ValueError(f"it nests more than {MAX_DEPTH} levels.")
    if isinstance(value, Mapping):
        return {_key(key): _form(part, finite, levels - 1) for key, part in value.items()}
    # A tuple is an entry of a Parquet map, which is a list of keys and values.
    if isinstance(value, list | tuple):
        return [_form(part, finite, levels - 1) for part in value]
    raise ValueError(f"a value of type {type(value).__name__} has no form in the output.")


def _number_text(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _text(value: Any) -> str | None:
    """The text of a value that is one in JSON; None if it is another value."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return b64encode(value).decode("ascii")
    return None


def _duration(value: timedelta) -> str:
    """ISO 8601's, in seconds: PT90.5S."""
    seconds = value.days * 86400 + value.seconds
    # pandas' durations have nanoseconds, too.
    nanoseconds = value.microseconds * 1000 + getattr(value, "nanoseconds", 0)
    total = seconds * 10**9 + nanoseconds
    whole, part = divmod(abs(total), 10**9)
    fraction = f".{part:09}".rstrip("0") if part else ""
    return f"{'-' if total < 0 else ''}PT{whole}{fraction}S"


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"the key {brief(key)} of an object is no text.")
    return key


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value, keys included.

    Raises:
        ValueError: it nests too deeply.
    """
    left = [(value, 0)]
    while left:
        part, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} levels.")
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            left += [(inner, depth + 1) for pair in part.items() for inner in pair]
        elif isinstance(part, list | tuple):
            left += [(inner, depth + 1) for inner in part]
