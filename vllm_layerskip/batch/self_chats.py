# SPDX-License-Identifier: Apache-2.0
"""Chats out of nothing but a model: it asks the questions, and answers them.

Of ``generate`` this uses the engine's loop, the journal and the folder that says whose answers it
holds. It is no ``job.Job``: a job's rows are files, and here each answer decides what is asked
next. Two jobs (questions, then answers) would start two engines for each round of questions that
were dropped and must be made up for.

The folder beside the output holds all that the model wrote. What a run asks for by selection only
(how many chats, ``exclude``, ``keep_unfinished``, ``max_minutes``) is not among its settings: a
later run may change them, and the model writes only what is missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vllm_layerskip.batch import one_engine, openai
from vllm_layerskip.batch.folder import SUMMARY, check, claim
from vllm_layerskip.batch.output import Answer, Journal, json_line
from vllm_layerskip.batch.self_chats_tries import (
    FIRST_TRIES,
    TRIES_PER_CHAT,
    Asked,
    Sampling,
    Tries,
    key_of,
)
from vllm_layerskip.batch.self_chats_turn import first_messages, user_turn
from vllm_layerskip.batch.settings import EngineSettings, JobSettings
from vllm_layerskip.chats.chat import read_chat
from vllm_layerskip.chats.messages import template_messages
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.found import JSON_LINES, record_files
from vllm_layerskip.files.records import Record, good_records, is_unicode, without_nulls
from vllm_layerskip.files.tokenizers import load_tokenizer
from vllm_layerskip.files.turns import is_text, turns_of
from vllm_layerskip.files.whole import whole_file, write_json

EXCLUDE = "--exclude"


@dataclass(frozen=True)
class SelfChatsSettings:
    """What to make."""

    output: Path
    num_chats: int
    engine: EngineSettings
    sampling: Sampling = field(default_factory=Sampling)
    exclude: Sequence[str] = ()
    """Files of questions that must not be among the chats."""
    keep_unfinished: bool = False
    """Whether answers that were cut off are kept."""
    max_minutes: float | None = None
    """When to stop, with the chats that are there then; counts from the start of ``self_chats``."""
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """What the model wrote so far."""
        return self.output.with_name(f"{self.output.name}.run")


@dataclass(frozen=True)
class _WrittenSettings(JobSettings):
    """All that the model's texts depend on, as ``settings.json`` has it."""

    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What came of it. Counts are of earlier runs, too, but for those of this run."""

    num_chats: int
    num_unfinished: int
    """Chats whose answer was cut off."""
    num_answer_tokens: int
    """In the chats."""
    num_questions: int
    """Sampled, dropped ones included, and those whose answer the end of the time cut off."""
    dropped: Mapping[str, int]
    num_tokens_of_this_run: int
    """All that the engine wrote."""
    seconds: float
    """Wall time of this run, the engine's start included."""
    note: str | None = None
    """If there are fewer chats than were asked for: why, and what to do."""


def self_chats(settings: SelfChatsSettings) -> Summary:
    """Make the chats that earlier runs have not made, and write all of them.

    Raises:
        UserError: a setting is wrong, the checkpoint has no fit chat template, the output is
            another job's, or no question gave a chat (in time).
    """
    start = time.perf_counter()
    deadline = start + 60 * (math.inf if settings.max_minutes is None else settings.max_minutes)
    written = _written_settings(settings)
    goes_on = _check_output(settings, written)
    tokenizer = _tokenizer(settings.engine)
    asked = _asked(tokenizer, settings)
    excluded = excluded_keys(settings.exclude)
    begin = partial(claim, settings.folder, written, settings.overwrite)
    with Journal(settings.folder, begin, goes_on) as journal:
        tries = Tries(
            asked,
            settings.num_chats,
            known=lambda index: journal.answer(index) if index in journal.offsets else None,
            is_shown=lambda question, answer: (
                _shown(tokenizer, _messages(question, answer, asked.sampling.system), answer)
                is not None
            ),
            excluded=excluded,
            keep_unfinished=settings.keep_unfinished,
        )
        generate = partial(one_engine.answers, settings=written)
        num_tokens = _ask(tries, journal, generate, deadline)
        if not tries.chats:
            raise UserError(_no_chats(tries, settings))
        journal.begin()
        counts = _write(settings.output, tries, journal, tokenizer)
        summary = Summary(
            **counts,
            num_questions=tries.num_questions,
            dropped=dict(tries.dropped.most_common()),
            num_tokens_of_this_run=num_tokens,
            seconds=round(time.perf_counter() - start, 3),
            note=_note(tries, settings.max_minutes),
        )
        write_json(settings.folder / SUMMARY, asdict(summary))
        journal.keep()
    return summary


def _written_settings(settings: SelfChatsSettings) -> _WrittenSettings:
    engine = settings.engine
    if "speculative_config" in engine.engine_args:
        raise UserError(
            "--engine-args: speculative_config cannot be given there. The plain model asks and "
            "answers; leave it out."
        )
    return _WrittenSettings(
        model=engine.model,
        speculative_config=engine.speculative_config(),
        engine_args=engine.llm_arguments(),
        sampling_params={},
        sampling=asdict(settings.sampling),
    )


def _check_output(settings: SelfChatsSettings, written: JobSettings) -> bool:
    """Whether there is an earlier run to go on with.

    Raises:
        UserError: the output's name is no JSON lines', or what is there is not this job's.
    """
    output = settings.output
    if output.suffix not in JSON_LINES:
        raise UserError(
            f"--output {output}: its name must end with {' or '.join(JSON_LINES)}, which is what "
            "it holds."
        )
    if output.is_dir():
        raise UserError(f"--output {output}: it is a folder. Name a file.")
    goes_on = check(settings.folder, written, settings.overwrite)
    if output.exists() and not goes_on and not settings.overwrite:
        raise UserError(
            f"--output {output}: it is there already, and {settings.folder}, which would say how "
            "it was made, is not. Choose another name, or --overwrite."
        )
    return goes_on


def _tokenizer(engine: EngineSettings) -> Any:
    given = engine.engine_args
    options = {name: given[name] for name in ("trust_remote_code", "revision") if name in given}
    if isinstance(name := given.get("tokenizer"), str):
        return load_tokenizer(name, "--engine-args: tokenizer", **options)
    return load_tokenizer(engine.model, "--model", **options)


def _asked(tokenizer: Any, settings: SelfChatsSettings) -> Asked:
    sampling = settings.sampling
    if sampling.system is not None and not (
        is_text(sampling.system) and is_unicode(sampling.system)
    ):
        raise UserError(
            f"--system {sampling.system!r:.80} must be a text that is not empty. Leave it out for "
            "the template's own."
        )
    try:
        turn = user_turn(tokenizer, sampling.system)
    except ValueError as error:
        system = "" if sampling.system is None else f" with --system {sampling.system!r:.40}"
        raise UserError(
            f"--model {settings.engine.model}{system}: {error} Use an instruction-tuned "
            "checkpoint whose template has a token at the end of a user's turn"
            f"{', or leave --system out' if system else ''}."
        ) from None
    return Asked(turn, sampling)


def excluded_keys(paths: Sequence[str]) -> frozenset[str]:
    """Keys of all questions in files: every turn of a user.

    Raises:
        UserError: a file cannot be read, or a record has no question.
    """
    files = record_files(paths, EXCLUDE)
    records = good_records(files, EXCLUDE, text="lines")
    return frozenset(key_of(text) for record in records for text in _questions(record))


def _questions(record: Record) -> list[str]:
    value = without_nulls(record.value) if record.is_row else record.value
    value = {"prompt": value} if isinstance(value, str) else value
    value = value if isinstance(value, Mapping) else {}
    if openai.is_request(value):
        value = value["body"]
    found = list(turns_of(value)) + [value.get(key) for key in ("prompt", "text")]
    if value.get("messages"):
        try:
            messages = template_messages(value["messages"], "string")
        except ValueError as error:
            raise UserError(f"{EXCLUDE} {record.where}: {error}") from None
        found = [message["content"] for message in messages if message["role"] == "user"]
    texts = [text for text in found if is_text(text)]
    if not texts:
        raise UserError(
            f"{EXCLUDE} {record.where}: there is no question. It must be a string, or an object "
            "with 'prompt', 'text', 'turns' or 'messages'."
        )
    return texts


def _ask(
    tries: Tries,
    journal: Journal,
    generate: Callable[[Iterable[Any]], Iterator[Answer]],
    deadline: float,
) -> int:
    """Have the engine write what is missing, with a progress bar on stderr.

    Args:
        deadline: a time of ``time.perf_counter``; the first answer after it is the last one.

    Returns:
        How many tokens it wrote.
    """
    from tqdm import tqdm

    if not tries.has_rows():  # No engine is started for nothing.
        return 0
    num_tokens = 0
    answers = generate(tries.rows())
    # Without an answer there is no bar: a start that fails says why in one line.
    for first in islice(answers, 1):
        with tqdm(total=tries.num_chats, initial=len(tries.chats), unit="chat") as progress:
            for answer in chain([first], answers):
                journal.add(answer)
                tries.take(answer)
                num_tokens += len(answer.token_ids or ())
                if more := len(tries.chats) - progress.n:
                    progress.update(more)
                if time.perf_counter() > deadline:
                    break
    return num_tokens


def _messages(question: str, answer: str, system: str | None) -> list[dict[str, str]]:
    return [*first_messages(question, system), {"role": "assistant", "content": answer}]


def _shown(tokenizer: Any, messages: Sequence[Mapping[str, Any]], answer: str) -> str | None:
    """The chat's text; None if the answer is not in it as the model wrote it.

    Drafts would learn from a text that the model does not write.
    """
    try:
        text = read_chat(tokenizer, messages).text()
    except ValueError:
        return None
    return text if answer.strip() in text else None


def _write(output: Path, tries: Tries, journal: Journal, tokenizer: Any) -> dict[str, int]:
    counts = {"num_chats": 0, "num_unfinished": 0, "num_answer_tokens": 0}
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as draft, draft.open("wb") as lines:
        for number in sorted(tries.chats):
            answer = journal.answer(2 * number + 1)
            lines.write(json_line(_row(tries, number, answer, tokenizer)))
            counts["num_chats"] += 1
            counts["num_unfinished"] += answer.finish_reason != "stop"
            counts["num_answer_tokens"] += len(answer.token_ids or ())
    return counts


def _row(tries: Tries, number: int, answer: Answer, tokenizer: Any) -> dict[str, Any]:
    """``train`` and ``tune`` read ``messages``, ``eval`` and ``draft-vocab`` the same as text."""
    said = answer.text or ""
    if answer.finish_reason != "stop":
        said = said.rstrip("\ufffd")  # A character that was cut, too.
    messages = _messages(tries.questions[number], said, tries.asked.sampling.system)
    text = _shown(tokenizer, messages, said) or ""
    if answer.finish_reason != "stop":  # What closes the turn is not the model's.
        text = text[: text.rindex(said.strip()) + len(said.strip())]
    return {"messages": messages, "finish_reason": answer.finish_reason, "text": text}


def _no_chats(tries: Tries, settings: SelfChatsSettings) -> str:
    if tries.is_done:
        return (
            f"--model {settings.engine.model}: none of {tries.num_begun} questions gave a chat: "
            f"{tries.drops()}. {tries.remedy()}"
        )
    return (
        f"{_early_end(settings.max_minutes)} before there was a chat (questions: "
        f"{tries.num_questions}, dropped: {tries.drops()}). The same command goes on "
        "from there; give it more time."
    )


def _note(tries: Tries, max_minutes: float | None) -> str | None:
    if len(tries.chats) >= tries.num_chats:
        return None
    few = f"Only {len(tries.chats)} of {tries.num_chats} chats"
    if tries.is_done:
        return (
            f"{few}: sampling ended after {tries.num_begun} questions ({FIRST_TRIES}, and "
            f"{TRIES_PER_CHAT} for each chat). {tries.remedy()}"
        )
    return f"{few}: {_early_end(max_minutes)}. The same command goes on from there."


def _early_end(max_minutes: float | None) -> str:
    """Why there was more to ask."""
    if max_minutes is None:
        return "the engine ended"
    return f"the time of --max-minutes {max_minutes:g} was over"
