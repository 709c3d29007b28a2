# SPDX-License-Identifier: Apache-2.0
"""A job: engines answer the rows that have no answer yet, the journal keeps the answers, and the
output file gets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vllm_layerskip.batch.folder import SUMMARY
from vllm_layerskip.batch.output import Answer, Journal, output_record, write_output
from vllm_layerskip.batch.rows import PromptRow, read_rows
from vllm_layerskip.files.whole import write_json

Generate = Callable[[Iterable[PromptRow]], Iterator[Answer]]
"""Answers rows, each once, in any order."""


@dataclass(frozen=True)
class Job:
    """The rows to answer and the file to write."""

    files: Sequence[Path]
    defaults: Mapping[str, Any]
    """Sampling parameters of rows that do not set them."""
    output: Path
    """The file to write; its folder is the job's, claimed."""
    with_token_ids: bool = False

    def rows(self) -> Iterator[PromptRow]:
        """All rows of the input; see ``read_rows``."""
        return read_rows(self.files, self.defaults)


@dataclass(frozen=True)
class Summary:
    """What a run did. The first three count answers of the job's earlier runs, too."""

    num_rows: int
    num_errors: int
    num_output_tokens: int
    num_rows_of_this_run: int
    seconds: float
    """Wall time of this run, the start of the engines included."""
    output_tokens_per_s: float
    """Output tokens of this run, per second."""
    acceptance_length: float | None
    """Mean tokens per verification, of this run; None if nothing is drafted, or with Ray."""


@dataclass
class _Tally:
    """Sums over answers."""

    num_rows: int = 0
    num_errors: int = 0
    num_tokens: int = 0
    num_drafts: int = 0
    num_accepted_tokens: int = 0

    def add(self, answer: Answer) -> None:
        self.num_rows += 1
        self.num_errors += answer.error is not None
        self.num_tokens += len(answer.token_ids or ())
        self.num_drafts += answer.num_drafts or 0
        self.num_accepted_tokens += answer.num_accepted_tokens or 0

    @property
    def acceptance_length(self) -> float | None:
        if not self.num_drafts:
            return None
        return round(1 + self.num_accepted_tokens / self.num_drafts, 3)


def run(job: Job, generate: Generate) -> Summary:
    """Do what is left of a job.

    Raises:
        UserError: the input cannot be read, or two of its rows have the same id.
        RuntimeError: the engines left rows without an answer.
    """
    start = time.perf_counter()
    folder, total = job.output.parent, _Tally()
    # One pass finds what is wrong with the input as a whole before an engine is started.
    num_rows = sum(1 for _ in job.rows())
    with Journal(folder) as journal:
        this_run = _complete(journal, job, num_rows, generate)
        write_output(job.output, _records(job, journal, total))
    seconds = time.perf_counter() - start
    summary = Summary(
        num_rows=num_rows,
        num_errors=total.num_errors,
        num_output_tokens=total.num_tokens,
        num_rows_of_this_run=this_run.num_rows,
        seconds=round(seconds, 3),
        output_tokens_per_s=round(this_run.num_tokens / seconds, 3),
        acceptance_length=this_run.acceptance_length,
    )
    write_json(folder / SUMMARY, asdict(summary))
    journal.path.unlink()
    return summary


def _complete(journal: Journal, job: Job, num_rows: int, generate: Generate) -> _Tally:
    """Add the missing answers to the journal, with a progress bar on stderr.

    Raises:
        RuntimeError: the engines left rows without an answer.
    """
    from tqdm import tqdm

    tally = _Tally()
    with tqdm(total=num_rows, initial=len(journal.offsets), unit="row") as progress:
        for answer in _answers(job, set(journal.offsets), generate):
            journal.add(answer)
            tally.add(answer)
            progress.update()
    left = num_rows - len(journal.offsets)
    if left:
        raise RuntimeError(
            f"{left} of {num_rows} rows have no answer, though the engines ended. Run the same "
            "command again to go on with them."
        )
    return tally


def _answers(job: Job, done: set[int], generate: Generate) -> Iterator[Answer]:
    """Answers to all rows that are not done: wrong rows at once, the rest from the engines."""
    for row in job.rows():
        if row.index not in done and row.error is not None:
            yield Answer(row.index, error=row.error)
    rows = (row for row in job.rows() if row.index not in done and row.error is None)
    # No engine is started for no row.
    first = next(rows, None)
    if first is not None:
        yield from generate(chain([first], rows))


def _records(job: Job, journal: Journal, total: _Tally) -> Iterator[dict[str, Any]]:
    """The output's rows in the input's order; adds their answers to ``total``."""
    for row in job.rows():
        answer = journal.answer(row.index)
        total.add(answer)
        yield output_record(row.id, row.columns, answer, job.with_token_ids)
