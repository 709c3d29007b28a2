# SPDX-License-Identifier: Apache-2.0
"""Result files: JSON, written again after every record, so that a killed run keeps what it has.

A file is ``{"schema": 1, "records": [...]}``. A record is one cell under one ``settings``: a mode
with a prompt length and a batch size (``"kind": "decode"``) or with a concurrency
(``"kind": "serve"``). ``status`` says what came of it:

=========  ==================================================================
ok         measured
no-room    the KV cache does not hold the batch
no-time    the time limit came first
error      the mode's process failed; ``error`` holds the end of its log
=========  ==================================================================

A record of a whole mode (its engine did not start) names no cell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import write_json

SCHEMA = 1
FINISHED = ("ok", "no-room")
OUT_OF_TIME = 3
"""Exit status of a table that its time limit left without some cells."""

Record = dict[str, Any]


def is_result_file(path: Path) -> bool:
    """Whether ``path`` holds records of this schema.

    Raises:
        ValueError: it is no JSON.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.get("schema") == SCHEMA


def load_existing(path: Path) -> list[Record]:
    """Records of a result file.

    Raises:
        UserError: there is no such file, or it is no result file of this schema.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file. Give a result file.")
    return load_records(path)


def load_records(path: Path) -> list[Record]:
    """Records of a result file; none if there is no file.

    Raises:
        UserError: the file is no result file of this schema.
    """
    if not path.exists():
        return []
    try:
        known = is_result_file(path)
    except ValueError:
        known = False
    if not known:
        raise UserError(f"{path} is no result file of schema {SCHEMA}. Choose another file.")
    return json.loads(path.read_text(encoding="utf-8"))["records"]


def add_record(path: Path, record: Record) -> None:
    """Add a record; it takes the place of an unfinished one of the same cell."""
    records = [
        other
        for other in load_records(path)
        if other["status"] in FINISHED or not _replaces(record, other)
    ]
    write_result(path, {"schema": SCHEMA, "records": [*records, record]})


def write_result(path: Path, content: Any, indent: int = 1) -> None:
    """Write a file of JSON in one step, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content, indent)


def finished_cells(records: Iterable[Record], mode: str, settings: Any) -> set[tuple[Any, ...]]:
    """Cells that need no second run, each as its values of ``CELL_NAMES``."""
    return {
        _cell(record)
        for record in records
        if record["status"] in FINISHED
        and record["mode"] == mode
        and record["settings"] == settings
    }


CELL_NAMES = ("prompt_len", "batch_size", "concurrency")


def _cell(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in CELL_NAMES if name in record)


def _replaces(record: Record, other: Record) -> bool:
    """A cell's record also replaces that of the whole mode's failed start."""
    same_mode = all(record[name] == other[name] for name in ("kind", "mode", "settings"))
    return same_mode and _cell(other) in (_cell(record), ())


_EARLIER_PROGRAMS = {
    "python benchmarks/compare.py": "python -m benchmarks.decode.compare",
    "python benchmarks/cpu_runners.py": "python -m benchmarks.decode.cpu_runners",
    "python benchmarks/real_prompts.py": "python -m benchmarks.prompts.real_prompts",
}
"""Programs that recorded results before they moved, and their names today."""


def command_today(provenance: Mapping[str, Any]) -> str:
    """The recorded command, with the program's name today."""
    command: str = provenance["command"]
    for earlier, today in _EARLIER_PROGRAMS.items():
        command = command.replace(earlier, today)
    return command
