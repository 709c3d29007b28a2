# SPDX-License-Identifier: Apache-2.0
"""One mode of ``real_prompts.py``, in a process of its own: ``measure_prompts.py JOB OUTPUT``.

As many requests as the batch size run at once; one that ends makes room for the next. A second turn
is asked with its first turn and the mode's own answer before it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_arguments import engine_arguments, prepare_environment
from questions import Question
from settings import Settings

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
    number: int
    prompt: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Time and new tokens of each output."""
    num_drafts: int = 0
    num_accepted_tokens: int = 0

    @property
    def key(self) -> str:
        return f"{self.question.id}#{self.number}"

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
        self.tokenizer = llm.get_tokenizer()
        self.left_out: Counter[str] = Counter()

    def ask(self, questions: Sequence[Question]) -> tuple[list[Turn], float]:
        """All turns of all questions, and the seconds that they took."""
        self.left_out.clear()
        waiting = deque(Turn(q, 0, self._render([q.turns[0]], [])) for q in questions)
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
                    waiting.extend(self._next(turn))
        return ended, time.perf_counter() - start

    def _add(self, turn: Turn) -> bool:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = self.sampling
        ids = self.tokenizer(turn.prompt, add_special_tokens=not sampling.chat)["input_ids"]
        if not 0 < len(ids) <= sampling.max_prompt_tokens:
            self.left_out[turn.question.category] += 1
            return False
        # The same in every mode, and another one for every question.
        digest = hashlib.sha256(f"{sampling.seed} {turn.key}".encode()).digest()
        params = SamplingParams(
            temperature=sampling.temperature,
            seed=int.from_bytes(digest[:4], "big"),
            max_tokens=sampling.max_tokens,
            ignore_eos=sampling.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
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
                turn.num_drafts = sum(drafting.histogram)
                turn.num_accepted_tokens = sum(j * n for j, n in enumerate(drafting.histogram))

    def _next(self, turn: Turn) -> list[Turn]:
        turns = turn.question.turns
        if turn.number + 1 == len(turns):
            return []
        answer = self.tokenizer.decode(turn.token_ids, skip_special_tokens=True)
        return [Turn(turn.question, turn.number + 1, self._render(list(turns), [answer]))]

    def _render(self, turns: list[str], answers: list[str]) -> str:
        if not self.sampling.chat:
            parts = [turns[0]]
            for answer, turn in zip(answers, turns[1:], strict=True):
                parts.append(f"{answer}\n\n{turn}")
            return "".join(parts)
        messages = [{"role": "user", "content": turns[0]}]
        for answer, turn in zip(answers, turns[1:], strict=True):
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": turn},
            ]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; what is known of each answer."""
    settings = Settings(**job["settings"])
    sampling = Sampling(**job["sampling"])
    questions = [Question(q["id"], q["category"], tuple(q["turns"])) for q in job["questions"]]
    (batch_size,) = settings.batch_sizes
    prepare_environment(settings.device)
    from vllm import LLM

    from vllm_layerskip.tuning.provenance import provenance

    with tempfile.TemporaryDirectory() as folder:
        arguments = engine_arguments(settings, job["mode"], Path(folder))
        llm = LLM(**arguments, per_request_spec_decode_metrics="summary")
        asker = Asker(llm, sampling, batch_size)
        asker.ask(questions[: 2 * batch_size])  # Warm-up.
        runs = [asker.ask(questions) for _ in range(settings.repeats)]
        llm.llm_engine.engine_core.shutdown()
    by_key = [{turn.key: turn for turn in turns} for turns, _ in runs]
    answers = [
        {
            "key": turn.key,
            "category": turn.question.category,
            "num_tokens": len(turn.token_ids),
            "finish_reason": turn.finish_reason,
            "output": hashlib.sha256(json.dumps(turn.token_ids).encode()).hexdigest()[:12],
            "num_drafts": turn.num_drafts,
            "num_accepted_tokens": turn.num_accepted_tokens,
            "tpot_ms": [_ms(run[turn.key].tpot_s) if turn.key in run else None for run in by_key],
        }
        for turn in sorted(runs[0][0], key=lambda turn: turn.key)
    ]
    return {
        "mode": job["mode"],
        "settings": settings.identity() | {"batch_size": batch_size},
        "sampling": job["sampling"],
        "questions": job["source"],
        "left_out": dict(asker.left_out),
        "answers": answers,
        "runs_tokens_per_s": [
            round(sum(len(turn.token_ids) for turn in turns) / seconds, 2)
            for turns, seconds in runs
        ],
        "provenance": provenance(),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 4)


def main() -> None:
    job, output = map(Path, sys.argv[1:])
    record = measure(json.loads(job.read_text(encoding="utf-8")))
    output.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
