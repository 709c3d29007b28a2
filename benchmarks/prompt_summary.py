# SPDX-License-Identifier: Apache-2.0
"""What a run of ``real_prompts.py`` shows, by category.

* **Acceptance length**: tokens a verification, 1 + accepted / drafts, over the category's answers.
* **Speed-up**: plain decoding's mean time a token over the mode's, as the paper has it: mean over
  answers, each answer's the median of the runs. It leaves prefill out and gives every answer the
  same weight.
* **Equal**: answers with exactly plain decoding's tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALL = "all"


@dataclass(frozen=True)
class CategoryResult:
    """One mode in one category."""

    category: str
    num_answers: int
    num_tokens: float
    """Mean of an answer."""
    tpot_ms: float
    acceptance_length: float | None
    speedup: float
    num_equal: int


def label(record: Mapping[str, Any]) -> str:
    """The mode with its E and K."""
    settings = record["settings"]
    if record["mode"] == "plain":
        return "plain"
    if record["mode"] == "ngram":
        return f"ngram, K = {settings['num_speculative_tokens']}"
    return (
        f"{record['mode']}, E = {settings['exit_layer']}, K = {settings['num_speculative_tokens']}"
    )


def summarize(record: Mapping[str, Any], plain: Mapping[str, Any]) -> list[CategoryResult]:
    """Each category in the order of its name, and all of them last."""
    theirs = {answer["key"]: answer for answer in plain["answers"]}
    pairs = [(answer, theirs[answer["key"]]) for answer in record["answers"]]
    categories = sorted({answer["category"] for answer in record["answers"]})
    results = [
        _result(name, [pair for pair in pairs if pair[0]["category"] == name])
        for name in categories
    ]
    return [*results, _result(ALL, pairs)] if len(categories) > 1 else results


def _result(
    category: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> CategoryResult:
    ours = [answer for answer, _ in pairs]
    times = [(_median(a["tpot_ms"]), _median(b["tpot_ms"])) for a, b in pairs]
    timed = [(a, b) for a, b in times if a is not None and b is not None]
    tpot = statistics.fmean(a for a, _ in timed) if timed else float("nan")
    plain_tpot = statistics.fmean(b for _, b in timed) if timed else float("nan")
    num_drafts = sum(answer["num_drafts"] for answer in ours)
    accepted = sum(answer["num_accepted_tokens"] for answer in ours)
    return CategoryResult(
        category=category,
        num_answers=len(ours),
        num_tokens=statistics.fmean(answer["num_tokens"] for answer in ours),
        tpot_ms=tpot,
        acceptance_length=1 + accepted / num_drafts if num_drafts else None,
        speedup=plain_tpot / tpot,
        num_equal=sum(a["output"] == b["output"] for a, b in pairs),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
