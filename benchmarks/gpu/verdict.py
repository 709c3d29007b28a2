# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks.gpu.check_graphs`` saw of an engine, and whether that is a fault."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.twins.kinds import NONE

ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}
"""The largest log-probability gap that rounding explains; a wrong draft pass makes 1 or more."""
LEAST_COMPARED = 0.25
"""The least share of all tokens that come before the first difference of their answer."""
LEAST_SHARE = 0.5
"""The least share of verify steps that reuse exit states, and of those that replay a graph."""


@dataclass(frozen=True)
class Difference:
    """The first token of an answer that differs from plain decoding's."""

    prompt: int
    position: int
    plain_token: int
    token: int
    gap: float | None
    """Plain decoding's log-probability of its token less that of ours.

    None if ours is not among those that it reported.
    """

    def is_rounding(self, dtype: str) -> bool:
        return self.gap is not None and self.gap <= ROUNDING[dtype]


@dataclass(frozen=True)
class Observed:
    """What one LayerSkip engine did while it answered."""

    differences: list[Difference]
    num_compared: int
    """Tokens up to the first difference of each answer."""
    num_tokens: int
    num_accepted: int
    num_reused: int
    num_full: int
    num_replays: Mapping[str, int]


@dataclass(frozen=True)
class Answers:
    """What one engine answered."""

    token_ids: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    """By answer and position: log-probabilities of the best tokens."""
    seconds: float
    waits: tuple[str, ...] = ()
    """``file:line`` of the waits for the GPU that vLLM saw."""


def differences(plain: Answers, other: Answers) -> list[Difference]:
    """The first difference of each answer that has one."""
    found = []
    for prompt, (expected, tokens) in enumerate(zip(plain.token_ids, other.token_ids, strict=True)):
        pairs = enumerate(zip(expected, tokens, strict=True))
        position = next((index for index, (one, two) in pairs if one != two), None)
        if position is not None:
            one, two = expected[position], tokens[position]
            best = plain.logprobs[prompt][position]
            gap = best[one] - best[two] if two in best else None
            found.append(Difference(prompt, position, one, two, gap))
    return found


def faults(
    seen: Observed, dtype: str, expected: Collection[str], ruled_out: Collection[str] = ()
) -> list[str]:
    """The reasons why a check that saw this must fail.

    Args:
        expected: what must have happened: ``draft`` and ``verify`` graphs, ``reuse``.
        ruled_out: what must not have happened.
    """
    problems = [
        f"answer {one.prompt} differs at token {one.position}: {one.token} for {one.plain_token}, "
        f"log-probability gap {one.gap}"
        for one in seen.differences
        if not one.is_rounding(dtype)
    ]
    if seen.num_compared < LEAST_COMPARED * seen.num_tokens:
        problems.append(f"only {seen.num_compared} of {seen.num_tokens} tokens were compared")
    if seen.num_accepted == 0:
        problems.append("no draft was accepted")
    num_steps = seen.num_reused + seen.num_full
    happened = {"reuse": seen.num_reused, "draft": 0, "verify": 0} | dict(seen.num_replays)
    for kind, name in _KINDS.items():
        too_few = kind in expected and happened[kind] <= LEAST_SHARE * num_steps
        if too_few or (kind in ruled_out and happened[kind]):
            problems.append(f"{happened[kind]} {name} in {num_steps} steps")
    return problems


_KINDS = {
    "reuse": "verify steps reused exit states",
    "draft": "draft graphs were replayed",
    "verify": "verify graphs were replayed",
}


def describe(result: dict[str, Any]) -> str:
    """A result, one line for each engine."""
    return "\n".join(line_of(one, result["dtype"]) for one in result["checks"])


def line_of(one: dict[str, Any], dtype: str) -> str:
    """An engine's part of a result in one line."""
    problems = "".join(f"; FAULT: {problem}" for problem in one["problems"])
    if "num_answers" not in one:
        return f"{one['variant']}: no answer{problems}"
    replays = ", ".join(f"{kind} {count}" for kind, count in one["num_replays"].items())
    twin = one.get("draft_quantization", NONE)
    name = one["variant"] if twin == NONE else f"{one['variant']} {twin}"
    text = (
        f"{name}: {one['num_equal']} of {one['num_answers']} answers equal plain "
        f"decoding's in {dtype}; acceptance length {one['acceptance_length']:.2f}; verify steps "
        f"reused {one['num_reused']}, full {one['num_full']}; graphs replayed: {replays or 'none'}"
    )
    gaps = [None if each["gap"] is None else round(each["gap"], 5) for each in one["differences"]]
    if gaps:
        text += f"; log-probability gaps where they differ: {gaps}"
    if one["waits"]:
        text += f"; waits for the GPU that plain decoding does not have: {one['waits']}"
    return text + problems
