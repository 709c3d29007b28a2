# SPDX-License-Identifier: Apache-2.0
"""Answers on their way to the output file.

Each answer becomes a line of ``answers.partial.jsonl`` when it comes. A line that a crash cut off
is dropped, and its row runs again. When every row has its line, the output file is written whole,
in the order of the input.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_layerskip.batch.folder import ANSWERS
from vllm_layerskip.files.whole import whole_file

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


class Journal:
    """The answers so far, in a file that one process writes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ANSWERS
        self.offsets: dict[int, int] = {}
        """Where the line of each row begins."""
        end = 0
        if self.path.exists():
            with self.path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self.offsets[json.loads(line)["index"]] = end
                    end += len(line)
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(end)
        self._file.seek(end)
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._sync()
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            ValueError: the row has one already.
        """
        if answer.index in self.offsets:
            raise ValueError(f"Row {answer.index} has got a second answer.")
        self.offsets[answer.index] = self._file.tell()
        self._file.write(_json_line(asdict(answer)))
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_EVERY_S:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def answer(self, index: int) -> Answer:
        """The answer of a row; KeyError if it has none."""
        with self.path.open("rb") as lines:
            lines.seek(self.offsets[index])
            values = json.loads(lines.readline())
        ids = values["token_ids"]
        return Answer(**{**values, "token_ids": None if ids is None else tuple(ids)})


def output_record(
    row_id: str | int, columns: Mapping[str, Any], answer: Answer, with_token_ids: bool
) -> dict[str, Any]:
    """A row of the output. Our columns replace the input's columns of the same names."""
    record = {
        **columns,
        "id": row_id,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_output_tokens": None if answer.token_ids is None else len(answer.token_ids),
        "error": answer.error,
    }
    if with_token_ids:
        record["token_ids"] = None if answer.token_ids is None else list(answer.token_ids)
    return record


def write_output(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write all records, as JSON lines or Parquet by the name's ending; whole or not at all."""
    with whole_file(path) as draft:
        if path.suffix == ".parquet":
            _write_parquet(draft, records)
        else:
            with draft.open("wb") as lines:
                lines.writelines(map(_json_line, records))


def _json_line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can escape, but UTF-8 cannot hold.
        return json.dumps(record).encode() + b"\n"


def _write_parquet(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    # All records at once, since a column may have its first value in the last one.
    parquet.write_table(pyarrow.Table.from_pylist(_same_columns(list(records))), path)


def _same_columns(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for record in records for name in record)
    return [{name: record.get(name) for name in names} for record in records]
