# SPDX-License-Identifier: Apache-2.0
"""Measure one mode of ``benchmarks.prompts.real_prompts`` in this process.

    python -m benchmarks.prompts.measure JOB OUTPUT

Both are files of JSON. As many requests as the batch size run at once; one that ends makes room for
the next. The prompt of a second turn holds the first turn and the mode's own answer. Prefix caching
is off, so that every run does the whole work.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engines.arguments import engine_arguments, prepare_environment
from benchmarks.engines.questions import Question
from benchmarks.engines.settings import Settings
from benchmarks.prompts.chats import Chats
from benchmarks.prompts.drafts import speculative_config
from benchmarks.prompts.records import DIGEST_DIGITS
from vllm_layerskip.measuring.provenance import provenance
from vllm_layerskip.tuning.cells import output_digest

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn and where they end."""

    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    chat: bool
    max_prompt_tokens: int


@dataclass
class Turn:
    """A request: what is asked, and what came of it."""

    question: Question
    answers: tuple[tuple[int, ...], ...] = ()
    """Token ids of the answers to the turns before it."""
    num_prompt_tokens: int = 0
    start: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Time and new tokens of each output."""
    num_draft_tokens: int = 0
    histogram: list[int] = field(default_factory=list)
    """Steps by how many drafts they accepted, from none to K; empty without speculation."""

    @property
    def num_accepted_tokens(self) -> int:
        return sum(j * steps for j, steps in enumerate(self.histogram))

    @property
    def number(self) -> int:
        return len(self.answers)

    @property
    def key(self) -> str:
        return f"{self.question.id}#{self.number}"

    @property
    def num_steps(self) -> int:
        """Decoding steps; the first output is the prefill's."""
        return len(self.arrivals) - 1

    @property
    def seconds(self) -> float:
        """From the request to its last token."""
        return self.arrivals[-1][0] - self.start

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token, from the first output to the last; None for a single output."""
        (start, _), (end, _) = self.arrivals[0], self.arrivals[-1]
        num_tokens = sum(number for _, number in self.arrivals[1:])
        return (end - start) / num_tokens if num_tokens else None


class Asker:
    """Runs questions through an engine."""

    def __init__(self, llm: LLM, sampling: Sampling, batch_size: int) -> None:
        self.engine, self.sampling, self.batch_size = llm.llm_engine, sampling, batch_size
        self.chats = Chats(llm.get_tokenizer(), sampling.chat)
        self.left_out: Counter[str] = Counter()
        """By category, the later turns that are too long with the answers before them."""

    def ask(self, questions: Sequence[Question]) -> tuple[list[Turn], float]:
        """All turns of all questions, and the seconds that they took."""
        self.left_out.clear()
        waiting = deque(Turn(question) for question in questions)
        running: dict[str, Turn] = {}
        ended: list[Turn] = []
        start = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < self.batch_size:
                turn = waiting.popleft()
                if self._add(turn):
                    running[turn.key] = turn
            for output in self.engine.step() if running else ():
                turn = running[output.request_id]
                self._take(turn, output)
                if output.finished:
                    ended.append(running.pop(turn.key))
                    waiting.extendleft(self._next(turn))
        return ended, time.perf_counter() - start

    def _add(self, turn: Turn) -> bool:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling, turns = self.sampling, turn.question.turns
        ids = self.chats.token_ids(turns[: turn.number + 1], turn.answers)
        if not 0 < len(ids) <= sampling.max_prompt_tokens:
            self.left_out[turn.question.category] += len(turns) - turn.number
            return False
        # Each turn has a seed of its own, the same in every mode.
        digest = hashlib.sha256(f"{sampling.seed} {turn.key}".encode()).digest()
        params = SamplingParams(
            temperature=sampling.temperature,
            seed=int.from_bytes(digest[:4], "big"),
            max_tokens=sampling.max_tokens,
            ignore_eos=sampling.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        turn.num_prompt_tokens, turn.start = len(ids), time.perf_counter()
        self.engine.add_request(turn.key, TokensPrompt(prompt_token_ids=ids), params)
        return True

    def _take(self, turn: Turn, output: Any) -> None:
        (completion,) = output.outputs
        turn.token_ids += completion.token_ids
        if completion.token_ids:
            turn.arrivals.append((time.perf_counter(), len(completion.token_ids)))
        if output.finished:
            turn.finish_reason = completion.finish_reason
            drafting = completion.spec_decode_metrics
            if drafting is not None:
                turn.num_draft_tokens = drafting.num_draft_tokens
                turn.histogram = list(drafting.histogram)

    def _next(self, turn: Turn) -> list[Turn]:
        if turn.number + 1 == len(turn.question.turns):
            return []
        return [Turn(turn.question, (*turn.answers, tuple(turn.token_ids)))]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; its record."""
    settings = Settings(**job["settings"])
    questions = [Question(q["id"], q["category"], tuple(q["turns"])) for q in job["questions"]]
    (batch_size,) = settings.batch_sizes
    prepare_environment(settings.device)
    import torch

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        llm = _start_engine(settings, job, Path(folder))
        runner = llm.collective_rpc(_runner_module)[0]
        start_s = round(time.perf_counter() - begin, 2)
        asker = Asker(llm, Sampling(**job["sampling"]), batch_size)
        asker.ask(questions[: 2 * batch_size])  # Warm-up.
        runs = [asker.ask(questions) for _ in range(settings.repeats)]
        llm.llm_engine.engine_core.shutdown()
    return {
        "mode": job["mode"],
        "settings": settings.identity() | {"batch_size": batch_size},
        "drafts": job["drafts"],
        "sampling": job["sampling"],
        "questions": job["source"],
        "later_turns_left_out": dict(sorted(asker.left_out.items())),
        "engine": {
            "start_s": start_s,
            "model_runner": runner,
            "num_threads": torch.get_num_threads(),
        },
        **_totals(runs[0][0]),
        "answers": _answers(questions, [turns for turns, _ in runs]),
        "runs_tokens_per_s": [
            round(sum(len(turn.token_ids) for turn in turns) / seconds, 2)
            for turns, seconds in runs
        ],
        # This process's own arguments are two temporary files.
        "provenance": {k: value for k, value in provenance().items() if k != "argv"},
    }


def _start_engine(settings: Settings, job: Mapping[str, Any], folder: Path) -> LLM:
    from vllm import LLM

    arguments = engine_arguments(settings, job["mode"], folder) | {"enable_prefix_caching": False}
    if job["drafts"] is not None:
        arguments["speculative_config"] = speculative_config(job["drafts"])
    if arguments["speculative_config"] is not None:
        arguments["per_request_spec_decode_metrics"] = "summary"
    return LLM(**arguments)


def _totals(turns: Sequence[Turn]) -> dict[str, Any]:
    """Facts of all answers together, out of the first run."""
    return {
        "num_prompt_tokens": sum(turn.num_prompt_tokens for turn in turns),
        "num_draft_tokens": sum(turn.num_draft_tokens for turn in turns),
        "num_accepted_at": accepted_by_position([turn.histogram for turn in turns]),
        "finish_reasons": dict(sorted(Counter(turn.finish_reason for turn in turns).items())),
    }


def accepted_by_position(histograms: Iterable[Sequence[int]]) -> list[int]:
    """How many steps accepted their first draft, their second one, and so on.

    Args:
        histograms: of each answer, its steps by how many drafts they accepted.
    """
    steps = [sum(column) for column in zip_longest(*histograms, fillvalue=0)]
    return [sum(steps[position:]) for position in range(1, len(steps))]


def _answers(questions: Sequence[Question], runs: Sequence[Sequence[Turn]]) -> list[dict[str, Any]]:
    """What is known of each answer, in the order of the questions; ``runs`` are its repeats."""
    order = {question.id: index for index, question in enumerate(questions)}
    by_key = [{turn.key: turn for turn in turns} for turns in runs]
    turns = sorted(runs[0], key=lambda turn: (order[turn.question.id], turn.number))
    return [_answer(turn, [run.get(turn.key) for run in by_key]) for turn in turns]


def _answer(turn: Turn, repeats: Sequence[Turn | None]) -> dict[str, Any]:
    """An answer of the first run, with the times of all runs; None where a run lacks the turn."""
    return {
        "key": turn.key,
        "question": turn.question.id,
        "category": turn.question.category,
        "num_tokens": len(turn.token_ids),
        "num_steps": turn.num_steps,
        "num_accepted_tokens": turn.num_accepted_tokens,
        "output": output_digest(turn.token_ids)[:DIGEST_DIGITS],
        "same_in_every_run": all(
            again is not None and again.token_ids == turn.token_ids for again in repeats
        ),
        "tpot_ms": [None if again is None else _ms(again.tpot_s) for again in repeats],
        "total_ms": [None if again is None else _ms(again.seconds) for again in repeats],
    }


def _runner_module(worker: Any) -> str:
    return type(worker.model_runner).__module__


def _ms(seconds: float | None) -> float | None:
    """Milliseconds with three digits: less than half a percent off, in a few characters."""
    if seconds is None:
        return None
    milliseconds = float(f"{1e3 * seconds:.3g}")
    return int(milliseconds) if milliseconds.is_integer() else milliseconds


def main() -> None:
    job, output = map(Path, sys.argv[1:])
    record = measure(json.loads(job.read_text(encoding="utf-8")))
    output.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
