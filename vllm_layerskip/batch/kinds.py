# SPDX-License-Identifier: Apache-2.0
"""Which type the values of a Parquet column share, found value by value.

JSON allows every value in every place; a column has one type. Values that have none in common
become texts: a text as it is, another value as its JSON. The same holds inside of objects and
lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vllm_layerskip.batch.values import json_form

if TYPE_CHECKING:
    import pyarrow

Scalar = Literal["null", "bool", "small", "int", "float", "text"]
"""``small`` is an integer that a double holds exactly."""


@dataclass(frozen=True)
class ListOf:
    """Lists, and what is in them."""

    part: Kind


@dataclass(frozen=True)
class Struct:
    """Objects, and what their keys hold."""

    fields: Mapping[str, Kind]


Kind = Scalar | ListOf | Struct
"""What the values of a column have in common so far."""

_MAX_FIELDS = 1000
"""Objects with more keys are tables of their own; as JSON they stay small."""
_MAX_LEVELS = 32
"""Readers of Parquet allow a hundred levels, and a list has two."""


def kind_of(value: Any, levels: int = _MAX_LEVELS) -> Kind:
    """The kind of one value; of a value in its ``json_form``."""
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int():
            return _kind_of_int(value)
        case float():
            return "float"
        case list() if levels:
            part: Kind = "null"
            for item in value:
                part = joined(part, kind_of(item, levels - 1))
            return ListOf(part)
        case dict() if levels:
            return _limited({key: kind_of(item, levels - 1) for key, item in value.items()})
    return "text"


def _kind_of_int(value: int) -> Kind:
    if abs(value) <= 2**53:
        return "small"
    return "int" if -(2**63) <= value < 2**63 else "text"


def joined(one: Kind, other: Kind) -> Kind:
    """The kind that holds both."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    if isinstance(one, ListOf) and isinstance(other, ListOf):
        return ListOf(joined(one.part, other.part))
    if isinstance(one, Struct) and isinstance(other, Struct):
        names = dict.fromkeys([*one.fields, *other.fields])
        return _limited(
            {n: joined(one.fields.get(n, "null"), other.fields.get(n, "null")) for n in names}
        )
    if one == "small" and other in ("int", "float"):
        return other
    if other == "small" and one in ("int", "float"):
        return one
    return "text"


def _limited(fields: dict[str, Kind]) -> Kind:
    return "text" if len(fields) > _MAX_FIELDS else Struct(fields)


def arrow_type(kind: Kind) -> pyarrow.DataType:
    """The type of a column of this kind."""
    import pyarrow

    if isinstance(kind, ListOf):
        return pyarrow.list_(arrow_type(kind.part))
    if isinstance(kind, Struct) and kind.fields:
        return pyarrow.struct([(name, arrow_type(part)) for name, part in kind.fields.items()])
    # Parquet has no object without keys.
    types = {
        "bool": pyarrow.bool_(), "small": pyarrow.int64(), "int": pyarrow.int64(),
        "float": pyarrow.float64(), "null": pyarrow.null(),
    }  # fmt: skip
    return types.get(kind, pyarrow.string()) if isinstance(kind, str) else pyarrow.string()


def arrow_value(value: Any, kind: Kind) -> Any:
    """A value as a column of this kind takes it; the kind must hold it."""
    if value is None:
        return None
    if isinstance(kind, ListOf):
        return [arrow_value(item, kind.part) for item in value]
    if isinstance(kind, Struct) and kind.fields:
        return {name: arrow_value(value.get(name), part) for name, part in kind.fields.items()}
    if kind == "float":
        return float(value)
    return _as_text(value) if kind == "text" or isinstance(kind, Struct) else value


def _as_text(value: Any) -> str:
    form = json_form(value)
    return form if isinstance(form, str) else json.dumps(form, ensure_ascii=False)
