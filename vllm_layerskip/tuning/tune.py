# SPDX-License-Identifier: Apache-2.0
"""Choose E, K and the schedule of a checkpoint: predict all (E, K), measure the best few.

1. Agreement of all exits with the target on the prompts, from one pass (``agreement.py``).
2. Costs of a step, from plain decoding and a few measured (E, K), or a roofline (``costs.py``).
3. Predicted speed-ups of all (E, K) and batch sizes (``predict.py``).
4. The best few run for real, and the choice is made among what was measured (``schedule.py``).

Statistics and rows stay in the results folder; a run that is started again goes on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning.cells import PLAIN, Row, append_rows, least_disturbed, load_rows
from vllm_layerskip.tuning.costs import (
    Costs,
    FittedCosts,
    MeasuredStep,
    RooflineCosts,
    design_cells,
    fit_costs,
)
from vllm_layerskip.tuning.predict import Prediction, predict
from vllm_layerskip.tuning.schedule import Choice, candidates, choose

Cell = tuple[int, int]
MeasureCells = Callable[[Sequence[Cell]], Iterable[Row]]
"""Measures cells (E, K) at all batch sizes; ``PLAIN`` is plain decoding."""

CELLS_FILE = "cells.csv"
_FULL_ROUNDS = 2
_FAR_BEHIND = 0.7
"""Of the fastest cell's speed: what two rounds with a disturbance each would not explain."""
ALL = -1
"""``num_measured`` for a full sweep."""


@dataclass(frozen=True)
class Grid:
    """What may be chosen."""

    exit_layers: tuple[int, ...]
    num_speculative_tokens: tuple[int, ...]
    batch_sizes: tuple[int, ...]

    @property
    def cells(self) -> list[Cell]:
        return [(e, k) for e in self.exit_layers for k in self.num_speculative_tokens]


@dataclass(frozen=True)
class Result:
    """What a run found."""

    grid: Grid
    agreement: Agreement
    costs: Costs
    predictions: tuple[Prediction, ...]
    rows: tuple[Row, ...]
    """Measured cells of these settings, plain decoding's too."""
    choice: Choice
    measured_speedups: Mapping[tuple[int, int, int], float] = field(default_factory=dict)
    """By (E, K, batch size)."""

    def prediction(self, exit_layer: int, drafts: int, batch_size: int) -> Prediction | None:
        for prediction in self.predictions:
            cell = (
                prediction.exit_layer,
                prediction.num_speculative_tokens,
                prediction.batch_size,
            )
            if cell == (exit_layer, drafts, batch_size):
                return prediction
        return None

    def row(self, cell: Cell, batch_size: int) -> Row | None:
        return next((r for r in self.rows if (r.cell, r.batch_size) == (cell, batch_size)), None)


class MeasuredCells:
    """The results folder's rows of one digest; measures what is missing.

    Args:
        rounds: how often each cell is measured. All cells have their turn in a round before the
            next one begins, so that they meet the same disturbances.
    """

    def __init__(
        self, path: Path, settings: str, batch_sizes: Sequence[int], rounds: int = 1
    ) -> None:
        self.path, self.settings, self.batch_sizes = path, settings, batch_sizes
        self.rounds = rounds
        self.all_rows = [row for row in load_rows(path) if row.settings == settings]

    @property
    def rows(self) -> dict[tuple[Cell, int], Row]:
        """By ((E, K), batch size)."""
        return least_disturbed(self.all_rows)

    def missing(self, cells: Iterable[Cell], num_rounds: int = 1) -> list[Cell]:
        """Cells with fewer than ``num_rounds`` rows at a batch size."""
        seen = Counter((row.cell, row.batch_size) for row in self.all_rows)
        return [
            cell
            for cell in dict.fromkeys(cells)
            if any(seen[cell, batch_size] < num_rounds for batch_size in self.batch_sizes)
        ]

    def measure(self, cells: Iterable[Cell], measure_cells: MeasureCells) -> None:
        """Have all of ``cells`` in the file; a row is in it as soon as it is measured."""
        cells = list(cells)
        for num_rounds in range(1, self.rounds + 1):
            missing = self.missing(self._contenders(cells, num_rounds), num_rounds)
            for row in measure_cells(missing) if missing else ():
                if row.settings != self.settings:
                    raise ValueError(f"A row of {row.settings} among those of {self.settings}.")
                append_rows(self.path, [row])
                self.all_rows.append(row)

    def _contenders(self, cells: Sequence[Cell], num_rounds: int) -> list[Cell]:
        """Cells that a round measures: all in the first two, then those that are not far behind."""
        if num_rounds <= _FULL_ROUNDS:
            return list(cells)
        rows = self.rows
        best = {
            size: max(row.tokens_per_s for (_, s), row in rows.items() if s == size)
            for size in self.batch_sizes
        }
        return [
            cell
            for cell in cells
            if cell == PLAIN
            or any(rows[cell, s].tokens_per_s >= _FAR_BEHIND * best[s] for s in self.batch_sizes)
        ]

    def plain_s(self) -> dict[int, float]:
        rows = self.rows
        return {size: rows[PLAIN, size].step_ms / 1e3 for size in self.batch_sizes}

    def steps(self, cells: Iterable[Cell]) -> list[MeasuredStep]:
        rows = self.rows
        return [
            MeasuredStep(*cell, size, rows[cell, size].step_ms / 1e3)
            for cell in cells
            for size in self.batch_sizes
        ]

    def speedups(self, grid: Grid) -> dict[tuple[int, int, int], float]:
        """Of the grid's cells over plain decoding, by (E, K, batch size)."""
        cells, rows = set(grid.cells), self.rows
        return {
            (*cell, size): row.tokens_per_s / rows[PLAIN, size].tokens_per_s
            for (cell, size), row in rows.items()
            if cell in cells and size in grid.batch_sizes and (PLAIN, size) in rows
        }


def tune(
    grid: Grid,
    agreement: Agreement,
    measured: MeasuredCells,
    measure_cells: MeasureCells,
    num_measured: int,
    roofline: RooflineCosts | None = None,
) -> Result:
    """Predict, measure, choose.

    Args:
        agreement: of all of the grid's exit layers.
        num_measured: cells to measure besides those that costs are fitted to; ``ALL`` for the
            whole grid.
        roofline: costs; they are measured if None.

    Raises:
        UserError: the continuations are too short for every K.
    """
    design: list[Cell] = []
    if roofline is None:
        design = design_cells(grid.exit_layers, grid.num_speculative_tokens)
        measured.measure([PLAIN, *design], measure_cells)
        costs: Costs = fit_costs(measured.steps(design), measured.plain_s())
    else:
        costs = roofline
    predictions = predict(
        agreement, costs, grid.num_speculative_tokens, grid.batch_sizes
    )  # fmt: skip
    predictions = [p for p in predictions if p.exit_layer in grid.exit_layers]
    if not predictions:
        raise UserError(
            f"--max-tokens: the {len(agreement.matches)} answers are too short for a step of "
            f"{min(grid.num_speculative_tokens)} drafts. Raise it, or give prompts with longer "
            "answers."
        )
    predicted = {
        (p.exit_layer, p.num_speculative_tokens, p.batch_size): p.speedup for p in predictions
    }
    if num_measured:
        best = grid.cells
        if num_measured != ALL:
            best = [cell for cell in candidates(predicted) if cell not in design][:num_measured]
        measured.measure([PLAIN, *best], measure_cells)
    speedups = measured.speedups(grid)
    return Result(
        grid=grid,
        agreement=agreement,
        costs=costs,
        predictions=tuple(predictions),
        rows=tuple(measured.rows.values()),
        choice=choose(speedups or predicted),
        measured_speedups=speedups,
    )


def step_costs(costs: Costs) -> Mapping[int, Any]:
    """The parts of fitted costs by batch size; none of a roofline's."""
    return costs.by_batch_size if isinstance(costs, FittedCosts) else {}
