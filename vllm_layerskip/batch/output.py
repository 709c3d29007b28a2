# SPDX-License-Identifier: Apache-2.0
"""Answers on their way to the output file.

Each answer of an engine becomes a line of ``answers.partial.jsonl`` when it comes. A line that a
crash cut off is dropped, and its row runs again. When every row has its line, the output file is
written, and the journal stays as ``answers.jsonl``: another output can be made of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from vllm_layerskip.batch.folder import ALL_ANSWERS, ANSWERS, lock

_SYNC_EVERY_S = 1.0


@dataclass(frozen=True)
class Answer:
    """What became of a row."""

    index: int
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    error: str | None = None
    num_drafts: int | None = None
    """Verifications; None if the engine does not say."""
    num_accepted_tokens: int | None = None
    row: str | None = None
    """The digest of the row that it belongs to; None in folders of earlier versions."""


class Journal:
    """The answers so far, in a file that one process writes, from its first answer on."""

    def __init__(self, folder: Path, claim: Callable[[], None], goes_on: bool = True) -> None:
        """
        Args:
            claim: makes the folder this job's; called once, before it is written to.
            goes_on: False to leave alone what is in the folder until then.
        """
        done, partial = folder / ALL_ANSWERS, folder / ANSWERS
        self.path = done if goes_on and done.exists() else partial
        self.offsets: dict[int, int] = {}
        """Where the line of each row begins."""
        self._rows: dict[int, str | None] = {}
        self._end = 0
        self._claim = claim
        self._file: IO[bytes] | None = None
        self._synced = time.monotonic()
        if goes_on and self.path.exists():
            self._read()

    def _read(self) -> None:
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    answer = json.loads(line)
                    self.offsets[answer["index"]] = self._end
                    self._rows[answer["index"]] = answer.get("row")
                except (ValueError, TypeError, KeyError):  # A crash damaged it.
                    break
                if not line.endswith(b"\n"):
                    del self.offsets[answer["index"]]
                    break
                self._end += len(line)

    def forget_unless(self, index: int, row: str) -> None:
        """Drop the answer of a row, if it was given to another one: an input had changed."""
        if self._rows.pop(index, None) not in (None, row):
            del self.offsets[index]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._sync(self._file)
            self._file.close()
            self._file = None

    def begin(self) -> IO[bytes]:
        """Make the folder this job's and open the journal, unless that is done.

        Raises:
            UserError: the folder cannot be this job's, or another run writes to it.
        """
        if self._file is None:
            self._claim()
            self._file = self.path.open("r+b" if self.path.exists() else "w+b")
            lock(self._file, self.path.parent)
            self._file.truncate(self._end)
            self._file.seek(self._end)
        return self._file

    def add(self, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            UserError: it is the first one, and the folder cannot be this job's.
            ValueError: the row has one already.
        """
        if answer.index in self.offsets:
            raise ValueError(f"Row {answer.index} has got a second answer.")
        file = self.begin()
        self.offsets[answer.index] = file.tell()
        file.write(json_line(asdict(answer)))
        file.flush()
        if time.monotonic() - self._synced > _SYNC_EVERY_S:
            self._sync(file)

    def _sync(self, file: IO[bytes]) -> None:
        os.fsync(file.fileno())
        self._synced = time.monotonic()

    def answer(self, index: int) -> Answer:
        """The answer of a row; KeyError if it has none."""
        with self.path.open("rb") as lines:
            lines.seek(self.offsets[index])
            values = json.loads(lines.readline())
        ids = values["token_ids"]
        return Answer(**{**values, "token_ids": None if ids is None else tuple(ids)})

    def keep(self) -> None:
        """Say by the file's name that the job is done."""
        self.path = self.path.replace(self.path.with_name(ALL_ANSWERS))


def json_line(record: Mapping[str, Any]) -> bytes:
    """A line of a JSON lines file. NaN is an error, for it is no JSON."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can escape, but UTF-8 cannot hold.
        return json.dumps(record, allow_nan=False).encode() + b"\n"
