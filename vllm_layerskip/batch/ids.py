# SPDX-License-Identifier: Apache-2.0
"""The ids of a job's rows: those that the input gives, and those of rows without one.

Where no row has an id, row numbers are the ids. Where some have, a made-up id says so (``row-7``)
and is nobody else's. It depends on the input only: a job that goes on makes up the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_layerskip.batch.rows import PromptRow
from vllm_layerskip.batch.values import brief
from vllm_layerskip.errors import UserError


class RowIds:
    """The ids of all rows, once each was added."""

    def __init__(self) -> None:
        self._given: dict[str | int, int] = {}
        self._without: list[int] = []

    def add(self, row: PromptRow) -> None:
        """Note a row's id.

        Raises:
            UserError: another row has it.
        """
        if row.id is None:
            self._without.append(row.index)
            return
        other = self._given.setdefault(row.id, row.index)
        if other != row.index:
            raise UserError(
                f"--input {row.where}: id {brief(row.id)} is that of row {other + 1} of the input, "
                "too. Ids must differ; leave them out to use row numbers."
            )

    def of(self, row: PromptRow) -> str | int:
        """The row's own id, or the one that is made up for it."""
        return self._made_up(row.index) if row.id is None else row.id

    def _made_up(self, index: int) -> str | int:
        if not self._given:
            return index
        made_up, number = f"row-{index}", 1
        while made_up in self._given:
            number += 1
            made_up = f"row-{index}-{number}"
        return made_up

    def made_up(self) -> Iterator[str | int]:
        """The ids of all rows without one."""
        return map(self._made_up, self._without)

    def check_as_texts(self) -> None:
        """For an output whose column of ids has one type: texts, if ids are texts and integers.

        Raises:
            UserError: two ids are the same text.
        """
        if not any(isinstance(given, str) for given in self._given):
            return
        for given, index in self._given.items():
            if isinstance(given, int) and (other := self._given.get(str(given))) is not None:
                raise UserError(
                    f"--input: ids {given} and {str(given)!r} (rows {index + 1} and {other + 1} "
                    "of the input) would be the same text in Parquet, whose columns have one "
                    "type. Change one, or choose --output-format jsonl."
                )
