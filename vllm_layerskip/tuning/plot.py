# SPDX-License-Identifier: Apache-2.0
"""The E x K map: predicted speed-up of every pair, a panel for each draft and batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_layerskip.tuning.grid import Cell, Grid
from vllm_layerskip.tuning.schedule import Choice
from vllm_layerskip.tuning.tune import DraftResult, Result

_MAX_LIMIT = 1.0
"""Logarithm (base 2) of the speed-up at which colours end, so that small gains are seen."""
_MAX_LABELLED = 16
"""Rows or columns up to which each field has its number."""


@dataclass(frozen=True, eq=False)
class _Panel:
    """What the map shows of one draft for one batch size."""

    title: str
    grid: Grid
    speedups: np.ndarray
    """``[E, K]`` measured speed-ups where there are any, predicted ones else; NaN without both."""
    measured: frozenset[Cell]
    star: Cell | None
    """The best pair of the chosen E."""

    def position(self, cell: Cell) -> tuple[int, int]:
        return _position(self.grid, cell)

    @property
    def is_labelled(self) -> bool:
        return max(self.speedups.shape) <= _MAX_LABELLED


def draw_map(result: Result, path: Path) -> None:
    """Write the map; the file's suffix says the format (``.png``, ``.svg``, ``.pdf``).

    Fields show the predicted speed-up, measured ones the measured one in bold with a frame; a star
    marks the best pair of the chosen E.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [[_panel(result, of, size) for size in result.batch_sizes] for of in result.drafts]
    grids = [of.grid for of in result.drafts]
    heights = [_height(grid) for grid in grids]
    figure, axes = plt.subplots(
        len(panels), len(panels[0]), figsize=(_width(grids[0]), 1.5 + sum(heights)),
        squeeze=False, sharey="row", layout="constrained", height_ratios=heights,
    )  # fmt: skip
    limit = _limit([panel for row in panels for panel in row])
    for row_axes, row in zip(axes, panels, strict=True):
        row_axes[0].set_ylabel("exit layer E")
        for axis, panel in zip(row_axes, row, strict=True):
            image = _draw(axis, panel, limit)
    _add_colour_bar(figure, image, axes, limit)
    figure.suptitle(
        "Predicted speed-up; bold in a frame: measured;\nstar: what was chosen",
        fontsize="medium",
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _width(grid: Grid) -> float:
    """Inches of the figure."""
    return 1.6 + max(len(grid.num_speculative_tokens) * 0.55, 3.2) * len(grid.batch_sizes)


def _height(grid: Grid) -> float:
    """Inches of a draft's row."""
    return max(len(grid.exit_layers) * 0.32, 2.4)


def _limit(panels: list[_Panel]) -> float:
    """Logarithm (base 2) of the speed-up at which colours end."""
    largest = max(float(np.nanmax(np.abs(np.log2(panel.speedups)))) for panel in panels)
    return min(largest or 0.1, _MAX_LIMIT)


def _panel(result: Result, of: DraftResult, batch_size: int) -> _Panel:
    grid = of.grid
    predicted = {p.cell: p.speedup for p in of.predictions if p.batch_size == batch_size}
    measured = {
        (e, k): speedup
        for (e, k, size), speedup in of.measured_speedups.items()
        if size == batch_size
    }
    speedups = np.full((len(grid.exit_layers), len(grid.num_speculative_tokens)), np.nan)
    for cell, speedup in (predicted | measured).items():
        speedups[_position(grid, cell)] = speedup
    is_chosen = of.draft == result.choice.draft
    star = _star(result.choice, grid, measured or predicted) if is_chosen else None
    title = f"batch size {batch_size}"
    if result.has_twins:
        title += f", {of.draft.name if of.draft.has_twin else 'own layers'}"
    return _Panel(title, grid, speedups, frozenset(measured), star)


def _position(grid: Grid, cell: Cell) -> tuple[int, int]:
    exit_layer, num_drafts = cell
    return grid.exit_layers.index(exit_layer), grid.num_speculative_tokens.index(num_drafts)


def _star(choice: Choice, grid: Grid, speedups: Mapping[Cell, float]) -> Cell | None:
    """The chosen E with its best K, unless its schedule drafts nothing at this batch size."""
    chosen = choice.exit_layer
    cells = [(chosen, k) for k in grid.num_speculative_tokens if (chosen, k) in speedups]
    best = max(cells, key=lambda cell: speedups[cell], default=None)
    if best is not None and choice.pays and not speedups[best] > 1:
        return None
    return best


def _draw(axis: Any, panel: _Panel, limit: float) -> Any:
    from matplotlib.colors import TwoSlopeNorm

    grid = panel.grid
    image = axis.imshow(
        np.log2(panel.speedups), cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -limit, limit),
        origin="lower", aspect="auto",
    )  # fmt: skip
    for cell in grid.cells:
        _label(axis, panel, cell, limit)
    axis.set_xticks(range(len(grid.num_speculative_tokens)), grid.num_speculative_tokens)
    axis.set_yticks(range(len(grid.exit_layers)), grid.exit_layers)
    axis.set_title(panel.title)
    axis.set_xlabel("drafts K")
    return image


def _label(axis: Any, panel: _Panel, cell: Cell, limit: float) -> None:
    """Write the field's number, and frame it if it was measured."""
    from matplotlib.patches import Rectangle

    row, column = panel.position(cell)
    speedup = panel.speedups[row, column]
    if cell in panel.measured:
        corner = (column - 0.5, row - 0.5)
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.2))
    star = "★" if cell == panel.star else ""
    text = f"{speedup:.2f}{star}" if panel.is_labelled and not np.isnan(speedup) else star
    is_dark = not np.isnan(speedup) and abs(np.log2(speedup)) > 0.6 * limit
    axis.text(
        column, row, text, ha="center", va="center", fontsize=7,
        color="white" if is_dark else "black",
        fontweight="bold" if cell in panel.measured else "normal",
    )  # fmt: skip


def _add_colour_bar(figure: Any, image: Any, axes: Any, limit: float) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.9, extend="both")
    ticks = [limit * part for part in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f"{2**tick:.2f}" for tick in ticks])
    bar.set_label("speed-up over plain decoding")
