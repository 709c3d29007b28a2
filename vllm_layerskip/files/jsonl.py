# SPDX-License-Identifier: Apache-2.0
"""Lines of JSON that users give: texts, and questions as known benchmarks have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_layerskip.errors import UserError


def json_value(line: str | bytes, where: str) -> Any:
    """The value of a line of a .jsonl file.

    Args:
        where: the file and line, for messages.

    Raises:
        UserError: the line is no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: this is no JSON ({error}). Correct the line.") from None


def jsonl_text(line: str, where: str, text_field: str) -> str:
    """The text of a line of a .jsonl file: its string, or the string in its ``text_field``.

    Args:
        where: the file and line, for messages.

    Raises:
        UserError: the line is no JSON or has no text.
    """
    value = json_value(line, where)
    text = value.get(text_field) if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(
            f"{where}: there is no text. Each line must be a JSON string, or an object with the "
            f"text in {text_field!r} (--text-field)."
        )
    return text


def turns_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The turns of a question in Spec-Bench's form (``turns``); none if it has another form.

    Source: github.com/hemingkx/Spec-Bench, ``question.jsonl``.
    """
    turns = record.get("turns")
    if not isinstance(turns, list) or not all(map(is_text, turns)):
        return ()
    return tuple(turns)


def is_text(value: object) -> bool:
    """Whether a value is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())
