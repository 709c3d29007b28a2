# SPDX-License-Identifier: Apache-2.0
"""Questions of known benchmarks: Spec-Bench, HumanEval and GSM8K, as their files have them.

==========  ======================================  ==============================================
format      keys of a line                          category
==========  ======================================  ==============================================
spec-bench  question_id, category, turns (1 or 2)   ``category``
humaneval   task_id, prompt                         what ``task_id`` has before its last ``/``
gsm8k       question                                ``gsm8k``; the id is the line's number
==========  ======================================  ==============================================
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """One or two turns of a user."""

    id: str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """All questions of a file of JSON lines, plain or ``.gz``; the keys tell the format.

    Raises:
        ValueError: the file cannot be read, or a line is no question; the message names it.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as file
        ):
            lines = [(n, line) for n, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}. Give a readable file of JSON lines.") from None
    questions = [_question(line, f"{path}, line {n}") for n, line in lines]
    if not questions:
        raise ValueError(f"{path}: there is no question in it. Give a file that holds some.")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{path}: id {question.id} is there twice. Make ids differ.")
        seen.add(question.id)
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: this is no JSON ({error}). Correct the line.") from None
    if isinstance(record, Mapping):
        turns = record.get("turns")
        if isinstance(turns, list) and 1 <= len(turns) <= 2 and all(map(_is_text, turns)):
            return Question(
                str(record.get("question_id", where)),
                str(record.get("category", "all")),
                tuple(turns),
            )
        if "task_id" in record and _is_text(record.get("prompt")):
            name = str(record["task_id"])
            return Question(name, name.rpartition("/")[0] or "all", (record["prompt"],))
        if _is_text(record.get("question")):
            return Question(where.rpartition(" ")[2], "gsm8k", (record["question"],))
    raise ValueError(
        f"{where}: this is no question. A line must have turns (Spec-Bench), task_id and prompt "
        "(HumanEval), or question (GSM8K)."
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def spread(questions: Sequence[Question], number: int | None) -> list[Question]:
    """``number`` of them, from the categories in turn, in the file's order."""
    if number is None or number >= len(questions):
        return list(questions)
    by_category: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_category[question.category].append(index)
    chosen: list[int] = []
    waiting = list(by_category.values())
    while len(chosen) < number:
        for indices in [w for w in waiting if w][: number - len(chosen)]:
            chosen.append(indices.pop(0))
    return [questions[index] for index in sorted(chosen)]
