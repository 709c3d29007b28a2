# SPDX-License-Identifier: Apache-2.0
"""What a run of ``benchmarks.prompts.real_prompts`` shows, by category.

* **Acceptance length**: tokens a decoding step, 1 + accepted drafts / steps, over the category's
  answers; a step without a draft (n-gram) counts as one token. Drafts that a stop token or the
  token limit cuts off the last step count as accepted, as in vLLM's own metric.
* **Tokens/s**: Spec-Bench's definition, the mean over questions of a question's tokens over the
  seconds of its requests, prefill included; a request's seconds are the median of the runs.
* **Speed-up**: the ratio of these means to plain decoding's, on the questions that both answered;
  Spec-Bench's definition, so that it compares with published tables.
* **Speed of decoding**: tokens after the first one of each answer over the seconds from its first
  output to its last, summed over the category, for each run. Requests that run at once share those
  seconds, so with a batch there is only the whole run's throughput, prefill included.
* **Its speed-up**: the ratio of medians over the runs, and the lowest and highest ratio of any two
  runs.
* **Speed-up of decoding**: plain decoding's mean time a token over the mode's, from a request's
  first output to its last. Prefill, which speculation does not change, is outside it.
* **Equal**: answers with exactly plain decoding's tokens, where both are greedy.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ALL = "all"

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Speeds:
    """Tokens/s of each run, and of each run of plain decoding."""

    ours: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ours)

    @property
    def speedup(self) -> float:
        """The ratio of the medians."""
        return self.median / statistics.median(self.plain)

    @property
    def speedup_range(self) -> tuple[float, float]:
        """Lowest and highest ratio of a run to a run of plain decoding."""
        return min(self.ours) / max(self.plain), max(self.ours) / min(self.plain)


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
    speeds: Speeds | None
    """Of decoding; with a batch of the whole run alone."""


def label(record: Mapping[str, Any]) -> str:
    """The mode with its drafts' name, or its E and K."""
    settings = record["settings"]
    if record["mode"] == "plain":
        return "plain"
    if record.get("drafts") is not None:
        return f"{record['mode']}, {record['drafts']['name']}"
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
    categories = list(dict.fromkeys(answer["category"] for answer, _ in pairs))
    results = [
        _result(name, [pair for pair in pairs if pair[0]["category"] == name], record, plain)
        for name in categories
    ]
    if len(categories) != 1:
        results.append(_result(ALL, pairs, record, plain))
    if batch_size(record) > 1:
        whole = Speeds(tuple(record["runs_tokens_per_s"]), tuple(plain["runs_tokens_per_s"]))
        results[-1] = replace(results[-1], speeds=whole)
    return results


def batch_size(record: Mapping[str, Any]) -> int:
    """Requests at once."""
    return record["settings"]["batch_size"]


def is_greedy(record: Mapping[str, Any]) -> bool:
    """Whether answers may be compared with plain decoding's."""
    return record["sampling"]["temperature"] == 0


def acceptance_by_position(record: Mapping[str, Any]) -> list[float]:
    """Share of the decoding steps that accepted their first draft, their second one, and so on.

    Their sum and 1 make the acceptance length. Empty where nothing was drafted, and for files of
    schema 1.
    """
    num_steps = sum(answer["num_steps"] for answer in record["answers"])
    return [count / num_steps for count in record.get("num_accepted_at", ())] if num_steps else []


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
    category: str,
    pairs: Sequence[tuple[Answer, Answer]],
    record: Mapping[str, Any],
    plain: Mapping[str, Any],
) -> CategoryResult:
    ours, theirs = [answer for answer, _ in pairs], [answer for _, answer in pairs]
    num_steps = sum(answer["num_steps"] for answer in ours)
    accepted = sum(answer["num_accepted_tokens"] for answer in ours)
    has_drafts = record["mode"] != "plain" and num_steps > 0
    speed, plain_speed = mean_question_speed(ours), mean_question_speed(theirs)
    is_compared = is_greedy(record) and is_greedy(plain)
    return CategoryResult(
        category=category,
        num_questions=len({answer["question"] for answer in ours}),
        num_answers=len(ours),
        num_tokens=statistics.fmean(answer["num_tokens"] for answer in ours),
        acceptance_length=1 + accepted / num_steps if has_drafts else None,
        tokens_per_s=speed,
        speedup=speed / plain_speed,
        decoding_speedup=_decoding_speedup(pairs),
        num_equal=sum(a["output"] == b["output"] for a, b in pairs) if is_compared else None,
        speeds=_speeds(ours, theirs) if batch_size(record) == 1 else None,
    )


def _speeds(ours: Sequence[Answer], theirs: Sequence[Answer]) -> Speeds | None:
    found = decode_speeds(ours), decode_speeds(theirs)
    return Speeds(*found) if all(found) else None


def decode_speeds(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Tokens/s of decoding, of each run; one request at a time.

    A request's first output is its prefill's only token. A run whose answers all have one token has
    no speed.
    """
    speeds = []
    for times in zip(*(answer["tpot_ms"] for answer in answers), strict=True):
        timed = [
            (answer["num_tokens"] - 1, time)
            for answer, time in zip(answers, times, strict=True)
            if time is not None
        ]
        milliseconds = sum(number * time for number, time in timed)
        if milliseconds:
            speeds.append(1e3 * sum(number for number, _ in timed) / milliseconds)
    return tuple(speeds)


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
