# SPDX-License-Identifier: Apache-2.0
"""The plot of ``vllm-layerskip eval``: perplexity, accuracy and agreement over the exit layer.

Made for the width of a paper's page: text of 8 to 9 points at that size, colours that can be told
apart with every kind of colour vision (Okabe and Ito), and markers that differ in print.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.report import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".pdf", ".png", ".svg")

_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"))
_RC: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "savefig.dpi": 300,
    "svg.hashsalt": "vllm-layerskip",  # The same data make the same file.
}
_INCHES = (7.0, 2.7)  # A page's text width.
_PANELS = (
    ("perplexity", "Perplexity (log scale)", 1),
    ("accuracy", "Next-token accuracy (%)", 100),
    ("agreement", "Agreement with last (%)", 100),
)
_MAX_TICKS = 8


def check_path(path: Path) -> None:
    """Refuse a path that ``write_plot`` cannot write.

    Raises:
        UserError: there is no such format, or matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"--plot {path}: the name must end with one of {', '.join(SUFFIXES)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            f"--plot {path} needs matplotlib. Install it (pip install 'vllm-layerskip[train]')."
        ) from None


def write_plot(result: Result, path: Path) -> None:
    """Draw a result to ``path``, in the format that its suffix names."""
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context(_RC):
        figure = draw(result)
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
        figure.savefig(path, metadata=metadata)


def draw(result: Result) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    for axes, (key, title, scale) in zip(panels, _PANELS, strict=True):
        for model, (color, marker, line) in zip(result["models"], _STYLES, strict=False):
            scores = [s for s in model["exits"] if math.isfinite(s[key])]
            axes.plot(
                [score["exit_layer"] for score in scores],
                [scale * score[key] for score in scores],
                color=color,
                marker=marker,
                linestyle=line,
                label=model["label"],
                clip_on=False,  # Whole markers at 100 %.
            )
        axes.set_xlabel("Exit layer (layers run)")
        axes.set_ylabel(title)
        _set_exit_ticks(axes, max(len(model["exits"]) for model in result["models"]))
        if key == "perplexity":
            _set_perplexity_scale(axes)
        else:
            axes.set_ylim(0, 100 if key == "agreement" else None)
    if len(result["models"]) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _set_exit_ticks(axes: Axes, num_layers: int) -> None:
    """Whole layers, the last one among them."""
    step = next(
        s for s in (1, 2, 4, 5, 8, 10, 16, 20, 40, 80, num_layers) if (num_layers / s <= _MAX_TICKS)
    )
    axes.set_xticks(range(num_layers, 0, -step))


def _set_perplexity_scale(axes: Axes) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 of each decade (at 1 where there are many)."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    many = math.log10(high / low) > 3
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if not many:
        axes.yaxis.set_major_formatter(ScalarFormatter())
