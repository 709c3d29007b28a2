# SPDX-License-Identifier: Apache-2.0
"""The E x K map: predicted speed-up of every pair, a panel for each batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vllm_layerskip.tuning.tune import Result

_MAX_SPREAD = 1.0
"""Logarithm (base 2) of the speed-up at which colours end, so that small gains are seen."""
_MAX_LABELLED = 16
"""Rows or columns up to which each field has its number."""


def draw_map(result: Result, path: Path) -> None:
    """Write the map; the file's suffix says the format (``.png``, ``.svg``, ``.pdf``).

    Fields show the predicted speed-up, measured ones the measured one in bold with a frame; a star
    marks the best pair of the chosen E.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    grid = result.grid
    values = {size: _values(result, size) for size in grid.batch_sizes}
    spread = max(float(np.nanmax(np.abs(np.log2(v)))) for v in values.values()) or 0.1
    spread = min(spread, _MAX_SPREAD)
    norm = TwoSlopeNorm(0.0, -spread, spread)
    num_panels = len(grid.batch_sizes)
    width = 1.6 + max(len(grid.num_speculative_tokens) * 0.55, 3.2) * num_panels
    height = 1.5 + max(len(grid.exit_layers) * 0.32, 2.4)
    figure, axes = plt.subplots(
        1, num_panels, figsize=(width, height), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, size in zip(axes[0], grid.batch_sizes, strict=True):
        image = axis.imshow(
            np.log2(values[size]), cmap="RdBu_r", norm=norm, origin="lower", aspect="auto"
        )
        _label(axis, result, size, values[size], spread)
        axis.set_title(f"batch size {size}")
        axis.set_xlabel("drafts K")
    axes[0][0].set_ylabel("exit layer E")
    bar = figure.colorbar(image, ax=axes, shrink=0.9, extend="both")
    ticks = [spread * part for part in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f"{2**tick:.2f}" for tick in ticks])
    bar.set_label("speed-up over plain decoding")
    figure.suptitle(
        "Predicted speed-up; bold in a frame: measured; star: what was chosen",
        fontsize="medium",
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _values(result: Result, batch_size: int) -> np.ndarray:
    """``[E, K]`` measured speed-ups where there are any, predicted ones else."""
    grid = result.grid
    values = np.full((len(grid.exit_layers), len(grid.num_speculative_tokens)), np.nan)
    for p in result.predictions:
        if p.batch_size == batch_size:
            cell = (p.exit_layer, p.num_speculative_tokens)
            values[_index(result, cell)] = p.speedup
    for (exit_layer, drafts, size), speedup in result.measured_speedups.items():
        if size == batch_size:
            values[_index(result, (exit_layer, drafts))] = speedup
    return values


def _index(result: Result, cell: tuple[int, int]) -> tuple[int, int]:
    grid = result.grid
    return grid.exit_layers.index(cell[0]), grid.num_speculative_tokens.index(cell[1])


def _label(axis: Any, result: Result, batch_size: int, values: np.ndarray, spread: float) -> None:
    from matplotlib.patches import Rectangle

    grid = result.grid
    measured = {cell[:2] for cell in result.measured_speedups if cell[2] == batch_size}
    numbered = max(values.shape) <= _MAX_LABELLED
    chosen = result.choice.exit_layer
    of_chosen = {k: values[_index(result, (chosen, k))] for k in grid.num_speculative_tokens
                 if not measured or (chosen, k) in measured}  # fmt: skip
    best = max(of_chosen, key=lambda k: of_chosen[k]) if of_chosen else None
    if best is not None and result.choice.pays and not of_chosen[best] > 1:
        best = None  # At this batch size nothing is drafted.
    for exit_layer in grid.exit_layers:
        for drafts in grid.num_speculative_tokens:
            cell = (exit_layer, drafts)
            row, column = _index(result, cell)
            value = values[row, column]
            if cell in measured:
                box = (column - 0.5, row - 0.5)
                axis.add_patch(Rectangle(box, 1, 1, fill=False, edgecolor="black", linewidth=1.2))
            star = "★" if cell == (chosen, best) else ""
            text = f"{value:.2f}{star}" if numbered and not np.isnan(value) else star
            dark = not np.isnan(value) and abs(np.log2(value)) > 0.6 * spread
            axis.text(
                column, row, text, ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
                fontweight="bold" if cell in measured else "normal",
            )  # fmt: skip
    axis.set_xticks(range(len(grid.num_speculative_tokens)), grid.num_speculative_tokens)
    axis.set_yticks(range(len(grid.exit_layers)), grid.exit_layers)
