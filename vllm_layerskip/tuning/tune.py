# SPDX-License-Identifier: Apache-2.0
"""Choose E, K and the schedule of a checkpoint: predict all (E, K), measure the best few.

1. Agreement of all exits with the target on the prompts, from one pass (``agreement.py``).
2. Costs of a step, from plain decoding and a few measured (E, K), or a roofline (``costs.py``).
3. Predicted speed-ups of all (E, K) and batch sizes (``predict.py``).
4. The best few run for real, and the choice is made among what was measured (``schedule.py``).

Statistics and measurements stay in the results folder; a run that is started again goes on from
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning.cells import Measurement
from vllm_layerskip.tuning.costs import (
    Costs,
    FittedCosts,
    RooflineCosts,
    StepCosts,
    design_cells,
    fit_costs,
)
from vllm_layerskip.tuning.grid import PLAIN, Cell, Grid
from vllm_layerskip.tuning.measured_cells import MeasureCells, MeasuredCells
from vllm_layerskip.tuning.predict import Prediction, predict
from vllm_layerskip.tuning.schedule import Choice, Speedups, candidates, choose
from vllm_layerskip.tuning.settings import ALL


@dataclass(frozen=True)
class Result:
    """What a run found."""

    grid: Grid
    agreement: Agreement
    costs: Costs
    predictions: tuple[Prediction, ...]
    measurements: tuple[Measurement, ...]
    """Under these settings, plain decoding's too; one for each cell and batch size."""
    choice: Choice
    measured_speedups: Speedups = field(default_factory=dict)

    @property
    def basis(self) -> str:
        """What the choice is made by."""
        return "measured" if self.measured_speedups else "predicted"

    @cached_property
    def _predictions(self) -> dict[tuple[int, int, int], Prediction]:
        return {(*p.cell, p.batch_size): p for p in self.predictions}

    @cached_property
    def _measurements(self) -> dict[tuple[Cell, int], Measurement]:
        return {(found.cell, found.batch_size): found for found in self.measurements}

    def prediction(self, exit_layer: int, num_drafts: int, batch_size: int) -> Prediction | None:
        return self._predictions.get((exit_layer, num_drafts, batch_size))

    def measurement(self, cell: Cell, batch_size: int) -> Measurement | None:
        return self._measurements.get((cell, batch_size))


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
        UserError: the answers are too short for every K.
    """
    design = [] if roofline else design_cells(grid.exit_layers, grid.num_speculative_tokens)
    costs = roofline or _measured_costs(design, measured, measure_cells)
    predictions = _predictions(grid, agreement, costs)
    predicted = {(*p.cell, p.batch_size): p.speedup for p in predictions}
    if num_measured:
        best = _best_cells(grid, predicted, design, num_measured)
        measured.measure([PLAIN, *best], measure_cells)
    speedups = measured.speedups(grid)
    return Result(
        grid=grid,
        agreement=agreement,
        costs=costs,
        predictions=predictions,
        measurements=tuple(measured.fastest.values()),
        choice=choose(speedups or predicted),
        measured_speedups=speedups,
    )


def _measured_costs(
    design: Sequence[Cell], measured: MeasuredCells, measure_cells: MeasureCells
) -> Costs:
    measured.measure([PLAIN, *design], measure_cells)
    return fit_costs(measured.steps(design), measured.plain_s())


def _predictions(grid: Grid, agreement: Agreement, costs: Costs) -> tuple[Prediction, ...]:
    predictions = predict(agreement, costs, grid.num_speculative_tokens, grid.batch_sizes)
    # Statistics of an earlier run may have more exit layers.
    in_grid = tuple(p for p in predictions if p.exit_layer in grid.exit_layers)
    if not in_grid:
        raise UserError(
            f"--max-tokens: the {len(agreement.matches)} answers are too short for a step of "
            f"{min(grid.num_speculative_tokens)} drafts. Raise it, or give prompts with longer "
            "answers."
        )
    return in_grid


def _best_cells(
    grid: Grid, predicted: Speedups, design: Sequence[Cell], num_measured: int
) -> list[Cell]:
    if num_measured == ALL:
        return grid.cells
    return [cell for cell in candidates(predicted) if cell not in design][:num_measured]


def step_costs(costs: Costs) -> Mapping[int, StepCosts]:
    """The parts of fitted costs by batch size; none of a roofline's."""
    return costs.by_batch_size if isinstance(costs, FittedCosts) else {}
