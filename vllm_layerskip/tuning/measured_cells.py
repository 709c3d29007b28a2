# SPDX-License-Identifier: Apache-2.0
"""The measurements of a results folder, and measuring those that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vllm_layerskip.tuning.cells import (
    Measurement,
    append_measurements,
    least_disturbed,
    load_measurements,
)
from vllm_layerskip.tuning.costs import MeasuredStep
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import PLAIN_DECODING, Cell, DraftCell, Grid

MeasureCells = Callable[[Sequence[DraftCell]], Iterable[Measurement]]
"""Measures cells at all batch sizes."""

_FULL_ROUNDS = 2
_FAR_BEHIND = 0.7
"""Share of the fastest cell's speed below which a cell drops out: even a disturbance in each of
the two rounds would not explain it."""


class MeasuredCells:
    """Measurements with one digest of settings; measures what is missing.

    Args:
        path: the CSV file.
        rounds: how often each cell is measured. All cells have their turn in a round before the
            next one begins, so that they meet the same disturbances.
    """

    def __init__(
        self, path: Path, settings_digest: str, batch_sizes: Sequence[int], rounds: int = 1
    ) -> None:
        self.path, self.settings_digest, self.batch_sizes = path, settings_digest, batch_sizes
        self.rounds = rounds
        self.all_rounds = [
            found for found in load_measurements(path) if found.settings_digest == settings_digest
        ]

    @property
    def fastest(self) -> dict[tuple[DraftCell, int], Measurement]:
        """Each cell's fastest round, by cell and batch size."""
        return least_disturbed(self.all_rounds)

    def missing(self, cells: Iterable[DraftCell], num_rounds: int = 1) -> list[DraftCell]:
        """Cells with fewer than ``num_rounds`` measurements at a batch size."""
        seen = Counter((found.draft_cell, found.batch_size) for found in self.all_rounds)
        return [
            cell
            for cell in dict.fromkeys(cells)
            if any(seen[cell, batch_size] < num_rounds for batch_size in self.batch_sizes)
        ]

    def measure(self, cells: Iterable[DraftCell], measure_cells: MeasureCells) -> None:
        """Have all of ``cells`` in the file; each measurement is in it as soon as it is made."""
        cells = list(cells)
        for num_rounds in range(1, self.rounds + 1):
            missing = self.missing(self._contenders(cells, num_rounds), num_rounds)
            for measurement in measure_cells(missing) if missing else ():
                self._add(measurement)

    def _add(self, measurement: Measurement) -> None:
        digest = measurement.settings_digest
        if digest != self.settings_digest:
            raise ValueError(f"A measurement of {digest} among those of {self.settings_digest}.")
        append_measurements(self.path, [measurement])
        self.all_rounds.append(measurement)

    def _contenders(self, cells: Sequence[DraftCell], num_rounds: int) -> list[DraftCell]:
        """Cells that a round measures: all in the first two, then those that are not far slower."""
        if num_rounds <= _FULL_ROUNDS:
            return list(cells)
        speeds = {key: found.tokens_per_s for key, found in self.fastest.items()}
        best = {
            size: max(speed for (_, other), speed in speeds.items() if other == size)
            for size in self.batch_sizes
        }
        return [
            cell
            for cell in cells
            if cell == PLAIN_DECODING
            or any(speeds[cell, size] >= _FAR_BEHIND * best[size] for size in self.batch_sizes)
        ]

    def plain_s(self) -> dict[int, float]:
        """Seconds of a plain step by batch size."""
        fastest = self.fastest
        return {size: fastest[PLAIN_DECODING, size].step_ms / 1e3 for size in self.batch_sizes}

    def steps(self, draft: Draft, cells: Iterable[Cell]) -> list[MeasuredStep]:
        fastest = self.fastest
        return [
            MeasuredStep(*cell, size, fastest[DraftCell(draft, cell), size].step_ms / 1e3)
            for cell in cells
            for size in self.batch_sizes
        ]

    def speedups(self, draft: Draft, grid: Grid) -> dict[tuple[int, int, int], float]:
        """Measured speed-ups of a draft's cells over plain decoding, by (E, K, batch size)."""
        cells, fastest = set(grid.cells), self.fastest
        plain = {size: fastest.get((PLAIN_DECODING, size)) for size in grid.batch_sizes}
        return {
            (*found.cell, size): found.tokens_per_s / of_plain.tokens_per_s
            for (_, size), found in fastest.items()
            if found.draft == draft and found.cell in cells and (of_plain := plain.get(size))
        }
