# SPDX-License-Identifier: Apache-2.0
"""The result file of ``benchmarks.prompts.real_prompts``: a record for each mode and its drafts.

In memory a record has its answers one by one. In a file they are columns in the order of ``keys``,
which all records share, and a record is a line: so hundreds of questions with several drafts stay
small. A file of schema 1 has them one by one, with more facts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.settings import Settings
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import write_text

KIND = "real-prompts"
SCHEMA = 2
DIGEST_DIGITS = 6
"""Hex digits of an answer's digest: two other answers look equal once in 17 million times."""

Record = dict[str, Any]

_COUNTS = ("num_tokens", "num_steps", "num_accepted_tokens")
_TIMES = ("tpot_ms", "total_ms")


def load(path: Path) -> list[Record]:
    """Records of a result file.

    Raises:
        UserError: it is another kind of file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    known = isinstance(content, dict) and content.get("kind") == KIND
    if not known or content.get("schema") not in (1, SCHEMA):
        raise UserError(f"{path} is no result file of real_prompts.")
    if content["schema"] == 1:
        return content["records"]
    keys = [(key, category) for category, of in content["keys"].items() for key in of]
    return [record | {"answers": _rows(record["answers"], keys)} for record in content["records"]]


def save(path: Path, records: Sequence[Record]) -> None:
    """Write the whole file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_category = _keys(records)
    keys = [key for of in by_category.values() for key in of]
    lines = [_line(record | {"answers": _columns(record["answers"], keys)}) for record in records]
    head = f'{{"schema": {SCHEMA}, "kind": "{KIND}",\n"keys": {_line(by_category)},\n"records": [\n'
    write_text(path, head + ",\n".join(lines) + "\n]}\n")


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _keys(records: Iterable[Record]) -> dict[str, list[str]]:
    """The answers' keys by category, in the order in which they come."""
    keys: dict[str, dict[str, None]] = {}
    for record in records:
        for answer in record["answers"]:
            keys.setdefault(answer["category"], {})[answer["key"]] = None
    return {category: list(of_category) for category, of_category in keys.items()}


def _columns(answers: Sequence[Record], keys: Sequence[str]) -> dict[str, Any]:
    """Answers as columns; ``missing`` has the places of keys that have no answer here."""
    by_key = {answer["key"]: answer for answer in answers}
    rows = [by_key[key] for key in keys if key in by_key]
    return {
        "missing": [place for place, key in enumerate(keys) if key not in by_key],
        "changed": [place for place, row in enumerate(rows) if not row["same_in_every_run"]],
        "output": "".join(row["output"][:DIGEST_DIGITS] for row in rows),
        **{name: [row[name] for row in rows] for name in _COUNTS},
        # A list for each run.
        **{name: list(zip(*(row[name] for row in rows), strict=True)) for name in _TIMES},
    }


def _rows(columns: Mapping[str, Any], keys: Sequence[tuple[str, str]]) -> list[Record]:
    """Answers one by one, out of their columns."""
    missing, changed = set(columns["missing"]), set(columns["changed"])
    answered = [key for place, key in enumerate(keys) if place not in missing]
    times = {name: list(zip(*columns[name], strict=True)) for name in _TIMES}
    return [
        {
            "key": key,
            "question": key.rpartition("#")[0],
            "category": category,
            **{name: columns[name][place] for name in _COUNTS},
            "output": columns["output"][place * DIGEST_DIGITS : (place + 1) * DIGEST_DIGITS],
            "same_in_every_run": place not in changed,
            **{name: list(times[name][place]) for name in _TIMES},
        }
        for place, (key, category) in enumerate(answered)
    ]


def is_record_of(record: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    """Whether a record is what the job would measure."""
    settings = Settings(**job["settings"])
    ours = settings.identity() | {"batch_size": settings.batch_sizes[0]}
    return (
        record["mode"] == job["mode"]
        and record["settings"] == ours
        and record.get("drafts") == job["drafts"]
        and record["sampling"] == job["sampling"]
        and record["questions"] == job["source"]
    )
