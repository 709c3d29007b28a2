# SPDX-License-Identifier: Apache-2.0
"""A job: engines answer the rows that have no answer yet, the journal keeps the answers, and the
output file gets all of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vllm_layerskip.batch.folder import ALL_ANSWERS, SUMMARY
from vllm_layerskip.batch.ids import RowIds
from vllm_layerskip.batch.output import Answer, Journal
from vllm_layerskip.batch.rows import TEXT_FIELD, PromptRow, read_rows
from vllm_layerskip.batch.writers import Writer, output_record, own_columns, writer_of
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import write_json

Generate = Callable[[Iterable[PromptRow]], Iterator[Answer]]
"""Answers rows, each once, in any order."""


def _is_claimed() -> None:
    """For a folder that is the job's."""


@dataclass(frozen=True)
class Job:
    """The rows to answer and the file to write."""

    files: Sequence[Path]
    defaults: Mapping[str, Any]
    """Sampling parameters of rows that do not set them."""
    output: Path
    """The file to write; its folder is the job's."""
    with_token_ids: bool = False
    claim: Callable[[], None] = _is_claimed
    """Makes the folder the job's, before the first answer is written."""
    goes_on: bool = True
    """Whether what is in the folder is this job's."""
    text_field: str = TEXT_FIELD

    def rows(self) -> Iterator[PromptRow]:
        """All rows of the input; see ``read_rows``."""
        return read_rows(self.files, self.defaults, self.text_field)


@dataclass(frozen=True)
class Summary:
    """What a run did. The first three count answers of the job's earlier runs, too.

    A run that had only to write an output keeps the numbers of the last one that answered rows.
    """

    num_rows: int
    num_errors: int
    num_output_tokens: int
    num_rows_of_this_run: int
    """Rows that engines answered; a row that is wrong in itself is none of them."""
    seconds: float
    """Wall time of this run, the start of the engines included."""
    output_tokens_per_s: float
    """Output tokens of this run, per second."""
    acceptance_length: float | None
    """Mean tokens per verification, of this run; None if nothing is drafted, or with Ray."""
    outputs: Mapping[str, bool] = field(default_factory=dict)
    """The files of answers, and whether they have token ids."""
    first_error: str | None = None
    """Of the rows that have one."""


@dataclass
class _Tally:
    """Sums over answers."""

    num_rows: int = 0
    num_errors: int = 0
    num_tokens: int = 0
    num_drafts: int = 0
    num_accepted_tokens: int = 0
    first_error: str | None = None

    def add(self, answer: Answer) -> None:
        self.num_rows += 1
        self.first_error = self.first_error or answer.error
        self.num_errors += answer.error is not None
        self.num_tokens += len(answer.token_ids or ())
        self.num_drafts += answer.num_drafts or 0
        self.num_accepted_tokens += answer.num_accepted_tokens or 0

    @property
    def acceptance_length(self) -> float | None:
        if not self.num_drafts:
            return None
        return round(1 + self.num_accepted_tokens / self.num_drafts, 3)


@dataclass
class _Input:
    """What one pass over the input finds, before an engine is started."""

    writer: Writer
    ids: RowIds = field(default_factory=RowIds)
    num_rows: int = 0
    wrong: set[int] = field(default_factory=set)
    """Rows that no engine is asked."""


def run(job: Job, generate: Generate) -> Summary:
    """Do what is left of a job.

    Raises:
        UserError: the input cannot be read, two of its rows have the same id, it has a value
            that the output cannot hold, or it changes meanwhile.
        RuntimeError: the engines left rows without an answer.
    """
    start = time.perf_counter()
    folder, total = job.output.parent, _Tally()
    with Journal(folder, job.claim, job.goes_on) as journal:
        found = _look_through(job, journal)
        this_run = _complete(journal, job, found, generate)
        journal.begin()
        found.writer.write(job.output, _records(job, found, journal, total))
    seconds = time.perf_counter() - start
    summary = Summary(
        num_rows=found.num_rows,
        num_errors=total.num_errors,
        num_output_tokens=total.num_tokens,
        num_rows_of_this_run=this_run.num_rows,
        seconds=round(seconds, 3),
        output_tokens_per_s=round(this_run.num_tokens / seconds, 3),
        acceptance_length=this_run.acceptance_length,
        outputs={**outputs_of(folder), job.output.name: job.with_token_ids},
        first_error=total.first_error,
    )
    _keep(folder, summary)
    journal.keep()
    return summary


def is_done(folder: Path) -> bool:
    """Whether all rows of the folder's job have their answers, and these are there."""
    return (folder / ALL_ANSWERS).exists()


def outputs_of(folder: Path) -> dict[str, bool]:
    """``Summary.outputs`` of the last run."""
    return dict(_earlier(folder).get("outputs", {}))


def _earlier(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _keep(folder: Path, summary: Summary) -> None:
    """Write the summary; that of a run which answered nothing has nothing new but the output."""
    earlier = {} if summary.num_rows_of_this_run else _earlier(folder)
    write_json(folder / SUMMARY, {**asdict(summary), **earlier, "outputs": summary.outputs})


def _look_through(job: Job, journal: Journal) -> _Input:
    """Find what is wrong with the input as a whole, and what the output could not hold.

    Raises:
        UserError: something is; the message names file, row and column.
    """
    found = _Input(writer_of(job.output, job.files, job.with_token_ids))
    own = own_columns(job.with_token_ids)
    for row in job.rows():
        found.num_rows += 1
        found.ids.add(row)
        if row.error is not None:
            found.wrong.add(row.index)
        passed_on = {name: value for name, value in row.columns.items() if name not in own}
        _see(found.writer, passed_on | ({} if row.id is None else {"id": row.id}), row.where)
        if row.index in journal.offsets:
            journal.forget_unless(row.index, _digest(row))
    if job.output.suffix == ".parquet":
        found.ids.check_as_texts()
    for made_up in found.ids.made_up():
        found.writer.see({"id": made_up})
    return found


def _see(writer: Writer, columns: Mapping[str, Any], where: str) -> None:
    try:
        writer.see(columns)
    except ValueError as error:
        raise UserError(f"--input {where}: {error}") from None


def _complete(journal: Journal, job: Job, found: _Input, generate: Generate) -> _Tally:
    """Add the missing answers to the journal, with a progress bar on stderr.

    Raises:
        UserError: the input has got more rows.
        RuntimeError: the engines left rows without an answer.
    """
    from tqdm import tqdm

    tally, done = _Tally(), found.wrong | set(journal.offsets)
    num_left = found.num_rows - len(done)
    answers = _answers(job, done, generate)
    # Without an answer there is no bar: a start that fails says why in one line.
    for first in islice(answers, 1):
        with tqdm(total=found.num_rows, initial=len(done), unit="row") as progress:
            for answer in chain([first], answers):
                journal.add(answer)
                tally.add(answer)
                progress.update()
    num_left -= tally.num_rows
    if num_left < 0:
        raise _has_changed(f"it has {-num_left} rows more")
    if num_left:
        raise RuntimeError(
            f"{num_left} of {found.num_rows} rows have no answer, though the engines ended. Run "
            "the same command again to go on with them."
        )
    return tally


def _answers(job: Job, done: set[int], generate: Generate) -> Iterator[Answer]:
    """Answers of the engines to all rows that are not done."""
    digests: dict[int, str] = {}

    def left() -> Iterator[PromptRow]:
        for row in job.rows():
            if row.index not in done:
                digests[row.index] = _digest(row)
                yield row

    rows = left()
    # No engine is started for no row.
    first = next(rows, None)
    if first is not None:
        for answer in generate(chain([first], rows)):
            yield replace(answer, row=digests.pop(answer.index, None))


def _digest(row: PromptRow) -> str:
    """Of all that a row holds: two that are equal may have each other's answer."""
    values = [
        row.id, row.columns, row.prompt, row.prompt_token_ids, row.messages, row.tools,
        row.sampling_params,
    ]  # fmt: skip
    content = json.dumps(values, default=repr)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _has_changed(what: str) -> UserError:
    return UserError(
        f"--input: {what} than when the job began. Put back what was there and give the same "
        "command again to go on, or begin anew with --overwrite."
    )


def _records(job: Job, found: _Input, journal: Journal, total: _Tally) -> Iterator[dict[str, Any]]:
    """The output's rows in the input's order; adds their answers to ``total``.

    Raises:
        UserError: the input has changed since its rows were answered.
    """
    for row in job.rows():
        if row.error is not None:
            answer = Answer(row.index, error=row.error)
        else:
            kept = journal.answer(row.index) if row.index in journal.offsets else None
            if kept is None or kept.row not in (None, _digest(row)):
                raise _has_changed(f"{row.where} is another row")
            answer = kept
        total.add(answer)
        yield output_record(found.ids.of(row), row.columns, answer, job.with_token_ids)
    if total.num_rows != found.num_rows:
        raise _has_changed(f"it has {found.num_rows - total.num_rows} rows less")
