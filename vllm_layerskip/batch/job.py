# SPDX-License-Identifier: Apache-2.0
"""A job: rows without an answer go to the engines, answers to the journal, all to the output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_layerskip.batch.output import Answer, Journal, output_record, write_output
from vllm_layerskip.batch.rows import Row, read_rows

Generate = Callable[[Iterable[Row]], Iterator[Answer]]
"""Answers rows, each once, in any order."""


@dataclass(frozen=True)
class Summary:
    """What a run did. Answers of earlier runs of the job count in the first three."""

    num_rows: int
    num_errors: int
    num_output_tokens: int
    num_rows_of_this_run: int
    seconds: float
    """Of this run, the engines' start included."""
    output_tokens_per_s: float
    """Of this run."""
    acceptance_length: float | None
    """Mean tokens a verification, of this run; None where nothing is drafted, or Ray runs it."""


@dataclass
class _Tally:
    """Of the answers of this run."""

    num_rows: int = 0
    num_tokens: int = 0
    num_drafts: int = 0
    num_accepted_tokens: int = 0

    def add(self, answer: Answer) -> None:
        self.num_rows += 1
        self.num_tokens += _num_tokens(answer)
        self.num_drafts += answer.num_drafts or 0
        self.num_accepted_tokens += answer.num_accepted_tokens or 0

    @property
    def acceptance_length(self) -> float | None:
        if not self.num_drafts:
            return None
        return round(1 + self.num_accepted_tokens / self.num_drafts, 3)


def run(
    files: Sequence[Path],
    defaults: Mapping[str, Any],
    folder: Path,
    output: Path,
    with_token_ids: bool,
    generate: Generate,
) -> Summary:
    """Do what is left of a job.

    Args:
        defaults: sampling parameters of rows that do not set them.
        folder: the job's, claimed.
        output: the file to write, in ``folder``.

    Raises:
        UserError: the input cannot be read, or has two rows of one id.
        RuntimeError: the engines left rows without an answer.
    """
    from tqdm import tqdm

    start = time.perf_counter()
    # One pass finds what concerns the input as a whole before an engine is started.
    num_rows = sum(1 for _ in read_rows(files, defaults))
    with Journal(folder) as journal:
        tally = _Tally()
        with tqdm(total=num_rows, initial=len(journal.offsets), unit="row") as progress:
            for answer in _answers(files, defaults, journal, generate):
                journal.add(answer)
                tally.add(answer)
                progress.update()
        left = num_rows - len(journal.offsets)
        if left:
            raise RuntimeError(
                f"{left} of {num_rows} rows have no answer, though the engines ended. Run the same "
                "command again to go on with them."
            )
        counts = [0, 0]
        write_output(output, _records(files, defaults, journal, with_token_ids, counts))
    seconds = time.perf_counter() - start
    summary = Summary(
        num_rows=num_rows,
        num_errors=counts[0],
        num_output_tokens=counts[1],
        num_rows_of_this_run=tally.num_rows,
        seconds=round(seconds, 3),
        output_tokens_per_s=round(tally.num_tokens / seconds, 3),
        acceptance_length=tally.acceptance_length,
    )
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    journal.path.unlink()
    return summary


def _answers(
    files: Sequence[Path], defaults: Mapping[str, Any], journal: Journal, generate: Generate
) -> Iterator[Answer]:
    """Of all rows that have none: at once for wrong ones, from the engines for the rest."""
    done = set(journal.offsets)
    for row in read_rows(files, defaults):
        if row.index not in done and row.error is not None:
            yield Answer(row.index, error=row.error)
    rows = (r for r in read_rows(files, defaults) if r.index not in done and r.error is None)
    first = next(rows, None)
    if first is not None:

        def left() -> Iterator[Row]:
            yield first
            yield from rows

        yield from generate(left())


def _records(
    files: Sequence[Path],
    defaults: Mapping[str, Any],
    journal: Journal,
    with_token_ids: bool,
    counts: list[int],
) -> Iterator[dict[str, Any]]:
    """The output's rows in the input's order; counts errors and tokens."""
    for row in read_rows(files, defaults):
        answer = journal.answer(row.index)
        counts[0] += answer.error is not None
        counts[1] += _num_tokens(answer)
        yield output_record(row.id, row.columns, answer, with_token_ids)


def _num_tokens(answer: Answer) -> int:
    return len(answer.token_ids or ())
