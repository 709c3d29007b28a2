# SPDX-License-Identifier: Apache-2.0
"""Questions as known benchmarks have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
