# SPDX-License-Identifier: Apache-2.0
"""Questions of known benchmarks: Spec-Bench, HumanEval and GSM8K, as their files have them.

==========  ======================================  ==============================================
format      keys of a line                          category
==========  ======================================  ==============================================
spec-bench  question_id, category, turns            ``category``
humaneval   task_id, prompt                         what ``task_id`` has before its last ``/``
gsm8k       question                                ``gsm8k``; the id is the line's number
==========  ======================================  ==============================================

A line that has only ``prompt`` is a question too. Where a line has no category, it is ``all``. A
chat model gets a prompt of HumanEval's format as a user's request to complete the function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any, TypeVar

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.found import record_files
from vllm_layerskip.files.records import Record, good_records
from vllm_layerskip.files.turns import is_text, turns_of

Item = TypeVar("Item")
_OPTION = "--questions"


@dataclass(frozen=True)
class Question:
    """One or more turns of a user."""

    id: str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path, *, chat: bool = False) -> list[Question]:
    """All questions of a file of JSON lines, plain or ``.gz``; the keys tell the format.

    Args:
        chat: turns are a user's, so that the beginning of a function becomes a request.

    Raises:
        UserError: the file cannot be read, or a line is no question; the message names it.
    """
    files = record_files([path], _OPTION)
    records = enumerate(good_records(files, _OPTION, text="lines"), start=1)
    questions = [_question(record, number, chat) for number, record in records]
    if not questions:
        raise UserError(
            f"{_OPTION} {path}: there is no question in it. Give a file that holds some."
        )
    return questions


def _question(record: Record, number: int, chat: bool) -> Question:
    value = record.value
    question = _known_form(value, number, chat) if isinstance(value, Mapping) else None
    if question is None:
        raise UserError(
            f"{_OPTION} {record.where}: this is no question. A line must have turns (Spec-Bench), "
            "prompt (HumanEval, with task_id), or question (GSM8K)."
        )
    return question


def _known_form(record: Mapping[str, Any], number: int, chat: bool) -> Question | None:
    turns, prompt, question = turns_of(record), record.get("prompt"), record.get("question")
    if turns:
        name = str(record.get("question_id", number))
        return Question(name, str(record.get("category", "all")), turns)
    if isinstance(prompt, str) and is_text(prompt):
        name = str(record.get("task_id", number))
        category = record.get("category") or name.rpartition("/")[0] or "all"
        turn = completion_request(prompt) if chat and "task_id" in record else prompt
        return Question(name, str(category), (turn,))
    if isinstance(question, str) and is_text(question):
        return Question(str(number), "gsm8k", (question,))
    return None


def completion_request(prompt: str) -> str:
    """What a user writes who has the beginning of a function, such as HumanEval's prompts."""
    code = dedent(prompt).rstrip()
    return f"Complete this Python function.\n\n```python\n{code}\n```"


def by_category(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """The questions of each category, in the order in which they come."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.category].append(question)
    return dict(groups)


def in_turn(groups: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of every group, then the second of every group that has one, and so on."""
    groups = list(groups)
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def require_different_ids(questions: Iterable[Question], path: Path) -> None:
    """Check the ids of a file's questions, by which answers are compared.

    Raises:
        UserError: an id is there twice.
    """
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{path}: id {question.id} is there twice. Make ids differ.")
        seen.add(question.id)


def choose_evenly(questions: Sequence[Question], number: int | None) -> list[Question]:
    """``number`` of them, from the categories in turn, in the file's order; all for None.

    Args:
        questions: with different ids.
    """
    chosen = {question.id for question in in_turn(by_category(questions).values())[:number]}
    return [question for question in questions if question.id in chosen]
