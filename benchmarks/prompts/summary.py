# SPDX-License-Identifier: Apache-2.0
"""What a run of ``benchmarks.prompts.real_prompts`` shows, by category.

* **Acceptance length**: tokens a decoding step, 1 + accepted drafts / steps, over the category's
  answers; a step without a draft (n-gram) counts as one token. Drafts that a stop token or the
  token limit cuts off the last step count as accepted, as in vLLM's own metric.
* **Tokens/s**: Spec-Bench's definition, the mean over questions of a question's tokens over the
  seconds of its requests, prefill included; a request's seconds are the median of the runs.
* **Speed-up**: the ratio of these means to plain decoding's, on the questions that both answered;
  Spec-Bench's definition, so that it compares with published tables.
* **Speed-up of decoding**: plain decoding's mean time a token over the mode's, from a request's
  first output to its last. Prefill, which speculation does not change, is outside it.
* **Equal**: answers with exactly plain decoding's tokens, where both are greedy.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALL = "all"

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class CategoryResult:
    """One mode in one category; what does not exist is None."""

    category: str
    num_questions: int
    num_answers: int
    num_tokens: float
    """Mean tokens of an answer."""
    acceptance_length: float | None
    tokens_per_s: float
    speedup: float
    decoding_speedup: float | None
    num_equal: int | None


def label(record: Mapping[str, Any]) -> str:
    """The mode with its E and K."""
    settings = record["settings"]
    if record["mode"] == "plain":
        return "plain"
    parts = [f"K = {settings['num_speculative_tokens']}"]
    if record["mode"] != "ngram":
        parts.insert(0, f"E = {settings['exit_layer']}")
    if settings.get("draft_vocab") and record["mode"].startswith("layerskip"):
        parts.append(f"draft vocabulary {settings['draft_vocab']}")
    return ", ".join([record["mode"], *parts])


def summarize(record: Mapping[str, Any], plain: Mapping[str, Any]) -> list[CategoryResult]:
    """Each category in the order of the questions, and all of them last.

    A turn that only one of the two could ask, since their answers before it differ, is left out.
    """
    theirs = {answer["key"]: answer for answer in plain["answers"]}
    pairs = [(a, theirs[a["key"]]) for a in record["answers"] if a["key"] in theirs]
    is_greedy = record["sampling"]["temperature"] == 0
    categories = list(dict.fromkeys(answer["category"] for answer, _ in pairs))
    results = [
        _result(name, [pair for pair in pairs if pair[0]["category"] == name], is_greedy)
        for name in categories
    ]
    return [*results, _result(ALL, pairs, is_greedy)] if len(categories) != 1 else results


def runs_spread(record: Mapping[str, Any]) -> float:
    """(max - min) / median of the runs' tokens/s."""
    speeds = record["runs_tokens_per_s"]
    return (max(speeds) - min(speeds)) / statistics.median(speeds)


def speedup_range(record: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[float, float]:
    """Lowest and highest ratio of a run's tokens/s to those of a run of plain decoding."""
    ours, theirs = record["runs_tokens_per_s"], plain["runs_tokens_per_s"]
    return min(ours) / max(theirs), max(ours) / min(theirs)


def outputs_differ(record: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Whether any greedy answer is not plain decoding's, or one of the two is missing."""
    ours, theirs = (
        {answer["key"]: answer["output"] for answer in one["answers"]} for one in (record, plain)
    )
    return ours != theirs


def _result(
    category: str, pairs: Sequence[tuple[Answer, Answer]], is_greedy: bool
) -> CategoryResult:
    ours, theirs = [answer for answer, _ in pairs], [answer for _, answer in pairs]
    num_steps = sum(answer["num_steps"] for answer in ours)
    num_drafted = sum(answer["num_draft_tokens"] for answer in ours)
    accepted = sum(answer["num_accepted_tokens"] for answer in ours)
    speed, plain_speed = mean_question_speed(ours), mean_question_speed(theirs)
    return CategoryResult(
        category=category,
        num_questions=len({answer["question"] for answer in ours}),
        num_answers=len(ours),
        num_tokens=statistics.fmean(answer["num_tokens"] for answer in ours),
        acceptance_length=1 + accepted / num_steps if num_drafted else None,
        tokens_per_s=speed,
        speedup=speed / plain_speed,
        decoding_speedup=_decoding_speedup(pairs),
        num_equal=sum(a["output"] == b["output"] for a, b in pairs) if is_greedy else None,
    )


def mean_question_speed(answers: Sequence[Answer]) -> float:
    """Mean over questions of tokens/s, over all turns of a question."""
    tokens: dict[str, int] = defaultdict(int)
    milliseconds: dict[str, float] = defaultdict(float)
    for answer in answers:
        tokens[answer["question"]] += answer["num_tokens"]
        milliseconds[answer["question"]] += _median(answer["total_ms"]) or 0.0
    return statistics.fmean(1e3 * tokens[name] / milliseconds[name] for name in tokens)


def _decoding_speedup(pairs: Sequence[tuple[Answer, Answer]]) -> float | None:
    times = [(_median(a["tpot_ms"]), _median(b["tpot_ms"])) for a, b in pairs]
    timed = [(a, b) for a, b in times if a is not None and b is not None]
    if not timed:
        return None
    return statistics.fmean(b for _, b in timed) / statistics.fmean(a for a, _ in timed)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
