# SPDX-License-Identifier: Apache-2.0
"""Choose E, K, schedule and draft of a checkpoint: predict all cells, measure the best few.

1. Agreement of all exits with the target on the prompts, from one pass (``agreement.py``), or one
   for each draft (``drafts.py``).
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
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import PLAIN_DECODING, Cell, DraftCell, Grid
from vllm_layerskip.tuning.measured_cells import MeasureCells, MeasuredCells
from vllm_layerskip.tuning.predict import Prediction, predict
from vllm_layerskip.tuning.schedule import Choice, Speedups, candidates, choose_draft
from vllm_layerskip.tuning.settings import ALL


@dataclass(frozen=True)
class DraftResult:
    """What a run found of one draft."""

    draft: Draft
    grid: Grid
    agreement: Agreement
    costs: Costs
    predictions: tuple[Prediction, ...]
    measured_speedups: Speedups = field(default_factory=dict)

    @cached_property
    def _predictions(self) -> dict[tuple[int, int, int], Prediction]:
        return {(*p.cell, p.batch_size): p for p in self.predictions}

    def prediction(self, exit_layer: int, num_drafts: int, batch_size: int) -> Prediction | None:
        return self._predictions.get((exit_layer, num_drafts, batch_size))


@dataclass(frozen=True)
class Result:
    """What a run found."""

    drafts: tuple[DraftResult, ...]
    measurements: tuple[Measurement, ...]
    """Under these settings, plain decoding's too; one for each cell and batch size."""
    choice: Choice

    @property
    def basis(self) -> str:
        """What the choice is made by."""
        return "measured" if any(of.measured_speedups for of in self.drafts) else "predicted"

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self.drafts[0].grid.batch_sizes

    @property
    def has_twins(self) -> bool:
        return any(of.draft.has_twin for of in self.drafts)

    @cached_property
    def _measurements(self) -> dict[tuple[DraftCell, int], Measurement]:
        return {(found.draft_cell, found.batch_size): found for found in self.measurements}

    def measurement(self, cell: DraftCell, batch_size: int) -> Measurement | None:
        return self._measurements.get((cell, batch_size))


def tune(
    grids: Mapping[Draft, Grid],
    agreements: Mapping[Draft, Agreement],
    measured: MeasuredCells,
    measure_cells: MeasureCells,
    num_measured: int,
    rooflines: Mapping[Draft, RooflineCosts] | None = None,
) -> Result:
    """Predict, measure, choose.

    Args:
        agreements: each of all of its draft's exit layers.
        num_measured: cells to measure besides those that costs are fitted to; ``ALL`` for all.
        rooflines: costs; they are measured if None.

    Raises:
        UserError: the answers are too short for every K.
    """
    designs = {} if rooflines else _designs(grids)
    costs = rooflines or _measured_costs(designs, measured, measure_cells)
    predictions = {
        draft: _predictions(grid, agreements[draft], costs[draft]) for draft, grid in grids.items()
    }
    predicted = {draft: _speedups(found) for draft, found in predictions.items()}
    if num_measured:
        best = _best_cells(grids, predicted, designs, num_measured)
        measured.measure([PLAIN_DECODING, *best], measure_cells)
    speedups = {draft: measured.speedups(draft, grid) for draft, grid in grids.items()}
    return Result(
        drafts=tuple(
            DraftResult(
                draft, grid, agreements[draft], costs[draft], predictions[draft], speedups[draft]
            )
            for draft, grid in grids.items()
        ),
        measurements=tuple(measured.fastest.values()),
        choice=choose_draft({d: found for d, found in speedups.items() if found} or predicted),
    )


def _designs(grids: Mapping[Draft, Grid]) -> dict[Draft, list[Cell]]:
    return {
        draft: design_cells(grid.exit_layers, grid.num_speculative_tokens)
        for draft, grid in grids.items()
    }


def _measured_costs(
    designs: Mapping[Draft, Sequence[Cell]], measured: MeasuredCells, measure_cells: MeasureCells
) -> dict[Draft, Costs]:
    """Costs of each draft, all of whose cells have their turn in a round."""
    measured.measure([PLAIN_DECODING, *_draft_cells(designs)], measure_cells)
    return {
        draft: fit_costs(measured.steps(draft, design), measured.plain_s())
        for draft, design in designs.items()
    }


def _draft_cells(cells: Mapping[Draft, Sequence[Cell]]) -> list[DraftCell]:
    return [DraftCell(draft, cell) for draft, of_draft in cells.items() for cell in of_draft]


def _speedups(predictions: Sequence[Prediction]) -> Speedups:
    return {(*p.cell, p.batch_size): p.speedup for p in predictions}


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
    grids: Mapping[Draft, Grid],
    predicted: Mapping[Draft, Speedups],
    designs: Mapping[Draft, Sequence[Cell]],
    num_measured: int,
) -> list[DraftCell]:
    if num_measured == ALL:
        return _draft_cells({draft: grid.cells for draft, grid in grids.items()})
    measured = set(_draft_cells(designs))
    return [cell for cell in candidates(predicted) if cell not in measured][:num_measured]


def step_costs(costs: Costs) -> Mapping[int, StepCosts]:
    """The parts of fitted costs by batch size; none of a roofline's."""
    return costs.by_batch_size if isinstance(costs, FittedCosts) else {}
