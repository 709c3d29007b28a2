# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown out of the records of ``benchmarks.prompts.real_prompts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.engines.markdown import markdown
from benchmarks.prompts.summary import (
    CategoryResult,
    acceptance_by_position,
    is_greedy,
    label,
    summarize,
)

HEADER = ("category", "questions", "answers", "tokens an answer", "mode", "acceptance length",
          "tokens/s", "x plain", "with prefill")  # fmt: skip
EQUAL = "equal to plain"


def plain_record(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The baseline."""
    return next(record for record in records if record["mode"] == "plain")


def table(records: Sequence[dict[str, Any]]) -> str:
    """All modes, category by category, as Markdown; sampled answers are not compared."""
    plain = plain_record(records)
    lines: dict[str, list[list[str]]] = {}
    for record in records:
        for result in summarize(record, plain):
            line = _columns(label(record), result)
            if record is plain:  # It is its own measure.
                line[HEADER.index("x plain")] = line[HEADER.index("with prefill")] = ""
            lines.setdefault(result.category, []).append(line)
    header = (*HEADER, EQUAL) if is_greedy(plain) else HEADER
    body = [line[: len(header)] for of_category in lines.values() for line in of_category]
    return markdown(header, body)


def _columns(mode: str, result: CategoryResult) -> list[str]:
    return [
        result.category,
        str(result.num_questions),
        str(result.num_answers),
        f"{result.num_tokens:.0f}",
        mode,
        two_digits(result.acceptance_length),
        *speed_columns(result),
        two_digits(result.speedup),
        equal_answers(result),
    ]


def speed_columns(result: CategoryResult) -> tuple[str, str]:
    """Tokens/s and speed-up of decoding, with their ranges over the runs; empty without speeds."""
    speeds = result.speeds
    if speeds is None:
        return "", ""
    slowest, fastest = min(speeds.ours), max(speeds.ours)
    tokens_per_s = with_range(speeds.median, slowest, fastest, digits=1)
    return tokens_per_s, with_range(speeds.speedup, *speeds.speedup_range)


def with_range(value: float, low: float, high: float, digits: int = 2) -> str:
    """A figure and what it ranges over; a single run has no range."""
    text = f"{value:.{digits}f}"
    return text if low == high else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def position_table(records: Sequence[dict[str, Any]]) -> str:
    """Share of the decoding steps that accepted their first draft, their second one, and so on."""
    shares = {label(record): acceptance_by_position(record) for record in records}
    longest = max(map(len, shares.values()))
    header = ("mode", *(f"draft {position + 1}" for position in range(longest)))
    body = [
        [name, *(f"{share:.2f}" for share in of_mode), *[""] * (longest - len(of_mode))]
        for name, of_mode in shares.items()
        if of_mode
    ]
    return markdown(header, body)


def equal_answers(result: CategoryResult) -> str:
    """How many answers equal plain decoding's; empty where answers are sampled."""
    return "" if result.num_equal is None else f"{result.num_equal} of {result.num_answers}"


def two_digits(value: float | None) -> str:
    """A figure's text; empty if it does not exist."""
    return "" if value is None else f"{value:.2f}"


def category_table(records: Sequence[dict[str, Any]], *, speedups: bool) -> str:
    """Acceptance length of LayerSkip's modes, and their speed-up, a row for each category."""
    plain = plain_record(records)
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
