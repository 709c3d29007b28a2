# SPDX-License-Identifier: Apache-2.0
"""Carry out a plan: agreement statistics, measurements, choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning.cells import CELLS_FILE, Measurement
from vllm_layerskip.tuning.grid import Cell, Grid
from vllm_layerskip.tuning.measured_cells import MeasuredCells
from vllm_layerskip.tuning.plan import TuningPlan
from vllm_layerskip.tuning.process_jobs import agreement_in_process, measure_in_processes
from vllm_layerskip.tuning.ray_jobs import agreement_on_cluster, measure_on_cluster
from vllm_layerskip.tuning.tune import Result, tune

Say = Callable[[str], None]
"""Shows a line of progress."""


def execute(plan: TuningPlan, say: Say) -> Result:
    """Predict, measure, choose; statistics and measurements go to the results folder as they come.

    Raises:
        UserError: a process or task failed, or statistics do not fit the plan.
    """
    agreement = _agreement(plan, say)
    measured = MeasuredCells(
        plan.outputs.results / CELLS_FILE,
        plan.settings_digest,
        plan.grid.batch_sizes,
        plan.settings.measuring.rounds,
    )

    def measure_cells(cells: Sequence[Cell]) -> Iterator[Measurement]:
        return _progress(_measure(plan, cells), len(cells) * len(plan.grid.batch_sizes), say)

    return tune(plan.grid, agreement, measured, measure_cells, plan.num_measured, plan.roofline)


def _measure(plan: TuningPlan, cells: Sequence[Cell]) -> Iterator[Measurement]:
    job, at_once = plan.cell_job(tuple(cells)), plan.settings.measuring.cells_per_process
    if plan.nodes is None:
        return measure_in_processes(job, at_once, plan.outputs.logs)
    return measure_on_cluster(job, at_once, plan.nodes, plan.identity)


def _progress(measurements: Iterable[Measurement], total: int, say: Say) -> Iterator[Measurement]:
    for number, found in enumerate(measurements, start=1):
        cell = f"E={found.exit_layer} K={found.num_speculative_tokens}"
        say(
            f"[{number}/{total}] {cell if found.exit_layer else 'plain'}, batch "
            f"{found.batch_size}: {found.tokens_per_s:.1f} tokens/s, {found.step_ms:.2f} ms a step"
        )
        yield found


def _agreement(plan: TuningPlan, say: Say) -> Agreement:
    given = plan.settings.measuring.agreement
    agreement = _kept_agreement(plan) if given is None else _given_agreement(given, plan.grid)
    if agreement is not None:
        return agreement
    say("Reading every exit's predictions along the model's greedy answers...")
    job, path = plan.agreement_job(), plan.outputs.agreement
    if plan.nodes is not None:
        return agreement_on_cluster(job, path, plan.nodes, plan.identity)
    return agreement_in_process(job, path, plan.outputs.logs)


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


def _kept_agreement(plan: TuningPlan) -> Agreement | None:
    """Statistics of an earlier run with these settings, if the results folder has them."""
    if not plan.outputs.agreement.exists():
        return None
    try:
        agreement, digest = Agreement.load(plan.outputs.agreement)
    except UserError:
        return None
    has_all = set(plan.grid.exit_layers) <= set(agreement.exit_layers)
    return agreement if has_all and digest == plan.settings_digest else None
