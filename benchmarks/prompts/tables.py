# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown out of the records of ``benchmarks.prompts.real_prompts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.engines.markdown import markdown
from benchmarks.prompts.summary import CategoryResult, label, summarize

HEADER = ("category", "questions", "answers", "tokens an answer", "mode", "acceptance length",
          "tokens/s", "speed-up", "of decoding", "equal to plain")  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> str:
    """All modes, category by category, as Markdown."""
    plain = next(record for record in records if record["mode"] == "plain")
    lines: dict[str, list[list[str]]] = {}
    for record in records:
        for result in summarize(record, plain):
            lines.setdefault(result.category, []).append(_columns(label(record), result))
    return markdown(HEADER, [line for of_category in lines.values() for line in of_category])


def _columns(mode: str, result: CategoryResult) -> list[str]:
    return [
        result.category,
        str(result.num_questions),
        str(result.num_answers),
        f"{result.num_tokens:.0f}",
        mode,
        two_digits(result.acceptance_length),
        f"{result.tokens_per_s:.1f}",
        two_digits(result.speedup),
        two_digits(result.decoding_speedup),
        equal_answers(result),
    ]


def equal_answers(result: CategoryResult) -> str:
    """How many answers equal plain decoding's; empty where answers are sampled."""
    return "" if result.num_equal is None else f"{result.num_equal} of {result.num_answers}"


def two_digits(value: float | None) -> str:
    """A figure's text; empty if it does not exist."""
    return "" if value is None else f"{value:.2f}"


def category_table(records: Sequence[dict[str, Any]], *, speedups: bool) -> str:
    """Acceptance length of LayerSkip's modes, and their speed-up, a row for each category."""
    plain = next(record for record in records if record["mode"] == "plain")
    drafting = [record for record in records if record["mode"] == "layerskip"]
    results = [summarize(record, plain) for record in drafting]
    header = ["category", "questions", "answers"]
    for record in drafting:
        name = label(record).removeprefix("layerskip, ")
        header.append(f"acceptance length, {name}")
        if speedups:
            header.append(f"speed-up, {name}")
    body = []
    for of_category in zip(*results, strict=True):
        first = of_category[0]
        columns = [first.category, str(first.num_questions), str(first.num_answers)]
        for result in of_category:
            columns.append(two_digits(result.acceptance_length))
            if speedups:
                columns.append(two_digits(result.speedup))
        body.append(columns)
    return markdown(header, body)


def left_out(records: Sequence[dict[str, Any]]) -> str:
    """How many questions and later turns had no place, by category."""
    too_long = records[0]["questions"]["too_long"]
    later = records[0]["later_turns_left_out"]
    parts = []
    if too_long:
        parts.append(f"questions of the file by their first prompt, {_by_category(too_long)}")
    if later:
        parts.append(f"later turns, whose prompt has the answer before, {_by_category(later)}")
    if not parts:
        return "Nothing was left out."
    limit = records[0]["sampling"]["max_prompt_tokens"]
    return f"Left out, since a prompt may have {limit} tokens: {'; '.join(parts)}."


def _by_category(counts: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {number}" for name, number in counts.items())
    return f"{sum(counts.values())} ({parts})"
