# SPDX-License-Identifier: Apache-2.0
"""Result files: JSON, written anew after every record, so that a killed run keeps what it has.

A file is ``{"schema": 1, "records": [...]}``. A record is one cell: one mode, prompt length and
batch size under one ``settings``; ``status`` says what came of it:

=========  ==================================================================
ok         measured
no-room    the KV cache does not hold the batch
no-time    the time limit came first
error      the mode's process failed; ``error`` holds the end of its log
=========  ==================================================================

A record of a whole mode (its engine did not start) has no prompt length and no batch size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA = 1
FINISHED = ("ok", "no-room")

Record = dict[str, Any]


def load_records(path: Path) -> list[Record]:
    """Records of a result file; none if there is no file.

    Raises:
        ValueError: the file is no result file of this schema.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result file of schema {SCHEMA}. Choose another file.")
    return content["records"]


def add_record(path: Path, record: Record) -> None:
    """Add a record; it takes the place of an unfinished one of the same cell."""
    key = _key(record)
    records = [
        other
        for other in load_records(path)
        if other["status"] in FINISHED or not _replaces(key, _key(other))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    content = {"schema": SCHEMA, "records": [*records, record]}
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def finished_cells(records: Iterable[Record], mode: str, settings: Any) -> set[tuple[int, int]]:
    """``(prompt length, batch size)`` of the cells that need no second run."""
    return {
        (record["prompt_len"], record["batch_size"])
        for record in records
        if record["status"] in FINISHED
        and record["mode"] == mode
        and record["settings"] == settings
    }


def _key(record: Record) -> tuple[Any, ...]:
    names = ("mode", "settings", "prompt_len", "batch_size")
    return tuple(record.get(name) for name in names)


def _replaces(key: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """A cell's record also replaces that of the whole mode's failed start."""
    return key == other or (key[:2] == other[:2] and other[2] is None)
