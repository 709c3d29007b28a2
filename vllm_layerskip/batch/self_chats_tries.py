# SPDX-License-Identifier: Apache-2.0
"""Tries: a question that the model is made to ask, and its own answer.

Each try has a number, two requests and two seeds. Questions are judged in the order of the numbers,
and a new try begins only if all that are under way could not make up the number of chats. So which
tries there are and which chats they give depends on what each request gives, and not on which of
them ends first, nor on interruptions.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.parameters import merged
from vllm_layerskip.batch.rows import PromptRow
from vllm_layerskip.batch.self_chats_turn import UserTurn, first_messages

FIRST_TRIES, TRIES_PER_CHAT = 100, 10
"""No try begins beyond this many, and this many for each chat so far: a model whose questions fail
is seen after a hundred. Tries that the user excluded come on top: a test set of the same seed."""

FAILED = "requests that the engine refused"
UNCLOSED = "questions that did not end as the template ends them"
SPECIAL = "questions with special tokens inside"
EMPTY = "empty questions"
REPEATED = "questions that an earlier one repeats"
EXCLUDED = "questions of --exclude"
NO_ANSWER = "empty answers"
UNFINISHED = "answers cut at --max-answer-tokens"
CHANGED = "answers that the template shows otherwise"
"""Reasons to drop a try."""

REMEDIES: Mapping[str, str] = {
    FAILED: "Correct what the engine says.",
    UNCLOSED: "A base model does not know the template: use an instruction-tuned one. For such a "
    "one raise --max-question-tokens or lower --temperature.",
    SPECIAL: "A base model does not know the template: use an instruction-tuned one. For such a "
    "one lower --temperature.",
    EMPTY: "Use another model, or give it something to ask about with --system.",
    REPEATED: "Raise --temperature or --top-p, or ask for fewer chats.",
    EXCLUDED: "Give another --seed, or exclude fewer questions.",
    NO_ANSWER: "Use another model.",
    UNFINISHED: "Raise --max-answer-tokens, or keep them with --keep-unfinished.",
    CHANGED: "Its template leaves out or changes what the model writes (reasoning, for instance); "
    "give the checkpoint one that shows it.",
}


@dataclass(frozen=True)
class Sampling:
    """How questions and answers are sampled."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_question_tokens: int = 256
    max_answer_tokens: int = 512
    answer_temperature: float = 0.0
    system: str | None = None
    """A system prompt, which the chats then begin with."""
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """Of which kind the requests are."""

    turn: UserTurn
    sampling: Sampling = field(default_factory=Sampling)

    def question_row(self, number: int) -> PromptRow:
        """The request for a try's question."""
        index = 2 * number
        params = merged(
            {
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "max_tokens": self.sampling.max_question_tokens,
                "stop_token_ids": [self.turn.close],
                "seed": self._seed(index),
            },
            None,
        )
        return PromptRow(index, prompt_token_ids=self.turn.prefix, sampling_params=params)

    def answer_row(self, number: int, question: str) -> PromptRow:
        """The request for the answer to a try's question, as ``generate`` would make it."""
        index = 2 * number + 1
        seed = self._seed(index) if self.sampling.answer_temperature else None
        params = merged(
            {
                "temperature": self.sampling.answer_temperature,
                "max_tokens": self.sampling.max_answer_tokens,
                "seed": seed,
            },
            None,
        )
        messages = tuple(first_messages(question, self.sampling.system))
        return PromptRow(index, messages=messages, sampling_params=params)

    def _seed(self, index: int) -> int:
        digest = hashlib.sha256(f"{self.sampling.seed}/{index}".encode()).digest()
        return int.from_bytes(digest[:7])

    def question_of(self, answer: Answer) -> tuple[str, str | None]:
        """A question's text, and what is wrong with it by itself."""
        ids = answer.token_ids or ()
        question = (answer.text or "").strip()
        if answer.error is not None:
            return question, FAILED
        if answer.finish_reason != "stop" or ids[-1:] != (self.turn.close,):
            return question, UNCLOSED
        if not self.turn.special.isdisjoint(ids[:-1]):
            return question, SPECIAL
        return question, None if question else EMPTY


def key_of(question: str) -> str:
    """Equal for questions that differ in case and white space only."""
    return " ".join(question.split()).casefold()


@dataclass
class Tries:
    """The tries so far, and what to ask the engine next (``rows``)."""

    asked: Asked
    num_chats: int
    known: Callable[[int], Answer | None]
    """The answer to a request of an earlier run."""
    is_shown: Callable[[str, str], bool]
    """Whether the template writes an answer as it is."""
    excluded: frozenset[str] = frozenset()
    """Keys of questions."""
    keep_unfinished: bool = False
    questions: dict[int, str] = field(default_factory=dict)
    """Of the chats, and of the tries that wait for their answer."""
    chats: list[int] = field(default_factory=list)
    """Numbers of the tries that gave one."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many tries, by reason."""
    num_begun: int = 0
    num_judged: int = 0
    first_error: str | None = None
    _seen: set[str] = field(default_factory=set)
    _unjudged: dict[int, Answer] = field(default_factory=dict)
    _ready: deque[PromptRow] = field(default_factory=deque)

    def has_rows(self) -> bool:
        """Whether there is something to ask now; takes in the answers of earlier runs."""
        while not self._ready and self._another():
            number = self.num_begun
            self.num_begun += 1
            self._ask(self.asked.question_row(number))
        return bool(self._ready)

    def rows(self) -> Iterator[PromptRow]:
        """Requests. It may end and go on after more answers: ``one_engine`` asks again.

        Iterators should not, but so one engine runs at full batches, without a wait for all
        questions before the first answer, and a new question costs no new engine.
        """
        return _Rows(self)

    def take(self, answer: Answer) -> None:
        """Take in the answer to a request."""
        number, is_answer = divmod(answer.index, 2)
        self.first_error = self.first_error or answer.error
        if is_answer:
            self._judge_answer(number, answer)
            return
        self._unjudged[number] = answer
        while (question := self._unjudged.pop(self.num_judged, None)) is not None:
            number, self.num_judged = self.num_judged, self.num_judged + 1
            self._judge_question(number, question)

    def _another(self) -> bool:
        most = FIRST_TRIES + TRIES_PER_CHAT * len(self.chats) + self.dropped[EXCLUDED]
        return self.num_begun - self.dropped.total() < self.num_chats and self.num_begun < most

    def _ask(self, row: PromptRow) -> None:
        answer = self.known(row.index)
        if answer is None:
            self._ready.append(row)
        else:
            self.take(answer)

    def _judge_question(self, number: int, answer: Answer) -> None:
        question, reason = self.asked.question_of(answer)
        key = key_of(question)
        if reason is None:
            reason = REPEATED if key in self._seen else None
            reason = EXCLUDED if reason is None and key in self.excluded else reason
            self._seen.add(key)
        if reason is not None:
            self.dropped[reason] += 1
            return
        self.questions[number] = question
        self._ask(self.asked.answer_row(number, question))

    def _judge_answer(self, number: int, answer: Answer) -> None:
        reason = self._fault(self.questions[number], answer)
        if reason is None:
            self.chats.append(number)
        else:
            self.dropped[reason] += 1
            del self.questions[number]

    def _fault(self, question: str, answer: Answer) -> str | None:
        text = answer.text or ""
        if answer.error is not None:
            return FAILED
        if answer.finish_reason != "stop" and not self.keep_unfinished:
            return UNFINISHED
        if not text.strip():
            return NO_ANSWER
        return None if self.is_shown(question, text) else CHANGED

    @property
    def num_questions(self) -> int:
        """How many questions the model wrote."""
        return self.num_judged + len(self._unjudged)

    @property
    def is_done(self) -> bool:
        """Whether each try has ended, and no other may begin."""
        num_ended = len(self.chats) + self.dropped.total()
        return num_ended == self.num_begun and not self._another()

    def drops(self) -> str:
        """How many tries were dropped, by reason."""
        counts = [f"{count} {reason}" for reason, count in self.dropped.most_common()]
        return ", ".join(counts) or "none"

    def remedy(self) -> str:
        """What to do about the most common reason; empty if nothing was dropped."""
        if not self.dropped:
            return ""
        ((reason, _),) = self.dropped.most_common(1)
        error = f"It said: {self.first_error} " if reason == FAILED else ""
        return error + REMEDIES[reason]


class _Rows:
    """See ``Tries.rows``."""

    def __init__(self, tries: Tries) -> None:
        self._tries = tries

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> PromptRow:
        if not self._tries.has_rows():
            raise StopIteration
        return self._tries._ready.popleft()
