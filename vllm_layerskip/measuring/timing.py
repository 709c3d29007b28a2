# SPDX-License-Identifier: Apache-2.0
"""Steady decoding: the window of a run in which every request decodes.

It opens with the step after which every request has a token and closes with the last step before
any request ends. So it contains no prefill, no batch that shrinks, and no last step whose surplus
tokens are cut off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Step:
    """What had been generated when an engine step's outputs arrived."""

    seconds: float
    num_tokens: Mapping[str, int]
    """New tokens by request; a request without new ones is absent."""
    has_finished: bool
    """Whether a request ended with this step."""


@dataclass(frozen=True)
class Window:
    """Steady decoding of one run."""

    seconds: float
    num_tokens: int
    num_steps: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def steady_window(steps: Sequence[Step], num_requests: int) -> Window:
    """Cut a run's steps to its steady window.

    Raises:
        ValueError: no step lies in it.
    """
    started: set[str] = set()
    first = last = None
    for index, step in enumerate(steps):
        if step.has_finished:
            break
        started.update(step.num_tokens)
        if first is None and len(started) == num_requests:
            first = index
        last = index
    if first is None or last is None or last == first:
        raise ValueError(
            f"No step in which all {num_requests} requests decode: raise --output-len, or lower "
            "--batch-sizes."
        )
    window = steps[first + 1 : last + 1]
    return Window(
        seconds=steps[last].seconds - steps[first].seconds,
        num_tokens=sum(sum(step.num_tokens.values()) for step in window),
        num_steps=len(window),
    )


def run_steps(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_token_ids: Sequence[int] = (),
    outputs: list[list[int]] | None = None,
) -> list[Step]:
    """Generate greedily for all prompts at once, one record for each step with new tokens.

    Args:
        stop_token_ids: what ends a request besides ``max_tokens``.
        outputs: gets each prompt's new tokens.
    """
    _add_requests(llm, prompts, max_tokens, stop_token_ids)
    steps = []
    generated: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    engine = llm.llm_engine
    while engine.has_unfinished_requests():
        arrived = engine.step()
        if arrived:
            num_tokens = {o.request_id: len(o.outputs[0].token_ids) for o in arrived}
            has_finished = any(output.finished for output in arrived)
            steps.append(Step(time.perf_counter(), num_tokens, has_finished))
            for output in arrived:
                generated[output.request_id] += output.outputs[0].token_ids
    if outputs is not None:
        outputs += generated.values()
    return steps


def _add_requests(
    llm: LLM, prompts: Sequence[Sequence[int]], max_tokens: int, stop_token_ids: Sequence[int]
) -> None:
    """Queue greedy requests, named by their index, that report only their new tokens."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        stop_token_ids=list(stop_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    for index, prompt in enumerate(prompts):
        tokens = TokensPrompt(prompt_token_ids=list(prompt))
        llm.llm_engine.add_request(str(index), tokens, params)
