# SPDX-License-Identifier: Apache-2.0
"""Carry out a plan: agreement statistics, measurements, choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning.cells import CELLS_FILE, Measurement
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import DraftCell, Grid
from vllm_layerskip.tuning.measured_cells import MeasuredCells
from vllm_layerskip.tuning.plan import TuningPlan
from vllm_layerskip.tuning.process_jobs import agreements_in_process, measure_in_processes
from vllm_layerskip.tuning.ray_jobs import agreements_on_cluster, measure_on_cluster
from vllm_layerskip.tuning.tune import Result, tune

Say = Callable[[str], None]
"""Shows a line of progress."""


def execute(plan: TuningPlan, say: Say) -> Result:
    """Predict, measure, choose; statistics and measurements go to the results folder as they come.

    Raises:
        UserError: a process or task failed, or statistics do not fit the plan.
    """
    agreements = _agreements(plan, say)
    measured = MeasuredCells(
        plan.outputs.results / CELLS_FILE,
        plan.settings_digest,
        plan.batch_sizes,
        plan.settings.measuring.rounds,
    )

    def measure_cells(cells: Sequence[DraftCell]) -> Iterator[Measurement]:
        return _progress(_measure(plan, cells), len(cells) * len(plan.batch_sizes), say)

    return tune(plan.grids, agreements, measured, measure_cells, plan.num_measured, plan.rooflines)


def _measure(plan: TuningPlan, cells: Sequence[DraftCell]) -> Iterator[Measurement]:
    job, at_once = plan.cell_job(tuple(cells)), plan.settings.measuring.cells_per_process
    if plan.nodes is None:
        return measure_in_processes(job, at_once, plan.outputs.logs)
    return measure_on_cluster(job, at_once, plan.nodes, plan.identity)


def _progress(measurements: Iterable[Measurement], total: int, say: Say) -> Iterator[Measurement]:
    for number, found in enumerate(measurements, start=1):
        say(
            f"[{number}/{total}] {found.draft_cell}, batch {found.batch_size}: "
            f"{found.tokens_per_s:.1f} tokens/s, {found.step_ms:.2f} ms a step"
        )
        yield found


def _agreements(plan: TuningPlan, say: Say) -> dict[Draft, Agreement]:
    given = plan.settings.measuring.agreement
    if given is not None:
        return {draft: _given_agreement(given, grid) for draft, grid in plan.grids.items()}
    missing = [draft for draft in plan.grids if _kept_agreement(plan, draft) is None]
    if missing:
        say("Reading every exit's predictions along the model's greedy answers...")
        job, folder = plan.agreement_job(missing), plan.outputs.results
        if plan.nodes is None:
            agreements_in_process(job, folder, plan.outputs.logs)
        else:
            agreements_on_cluster(job, folder, plan.nodes, plan.identity)
    return {draft: Agreement.load(plan.outputs.agreement(draft))[0] for draft in plan.grids}


def _given_agreement(path: Path, grid: Grid) -> Agreement:
    """Statistics that the user names are used whatever they were made with."""
    agreement, _ = Agreement.load(path)
    missing = set(grid.exit_layers) - set(agreement.exit_layers)
    if missing:
        raise UserError(
            f"--agreement {path} has no exit layers {sorted(missing)}; it has "
            f"{list(agreement.exit_layers)}. Give --exit-layers, or leave it out."
        )
    return agreement


def _kept_agreement(plan: TuningPlan, draft: Draft) -> Agreement | None:
    """Statistics of an earlier run with these settings, if the results folder has them."""
    path = plan.outputs.agreement(draft)
    if not path.exists():
        return None
    try:
        agreement, digest = Agreement.load(path)
    except UserError:
        return None
    has_all = set(plan.grids[draft].exit_layers) <= set(agreement.exit_layers)
    return agreement if has_all and digest == plan.settings_digest else None
