# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pages.real_files import WORKLOADS, RealFile, read_real_files
from benchmarks.prompts.records import load
from benchmarks.prompts.summary import CategoryResult, label, summarize
from benchmarks.prompts.tables import plain_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, for every kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
SPEED = ("bfloat16", 1)
"""Dtype and batch size of the runs whose speed is shown."""
_RC: Any = {"svg.hashsalt": "vllm-layerskip", "svg.fonttype": "none", "font.size": 8}


def draw_acceptance(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Acceptance length by category, a bar for each (E, K)."""
    plain = next(record for record in records if record["mode"] == "plain")
    drafting = [record for record in records if record["mode"] == "layerskip"]
    results = [summarize(record, plain) for record in drafting]
    names = [result.category for result in results[0]]
    with _figure(path, (7.2, 3.2)) as axes:
        width = 0.8 / len(drafting)
        for number, (record, found) in enumerate(zip(drafting, results, strict=True)):
            by_name = {result.category: result.acceptance_length or 1 for result in found}
            axes.bar(
                [i + (number - (len(drafting) - 1) / 2) * width for i in range(len(names))],
                [by_name[name] for name in names],
                width,
                color=_COLORS[number],
                hatch=("", "///", "...", "xxx")[number % 4],
                edgecolor="white",
                linewidth=0,
                label=label(record),
            )
        axes.axhline(1, color="#666666", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_ylabel("acceptance length\n(tokens per decoding step)")
        axes.legend(frameon=False, ncols=len(drafting), loc="lower right", bbox_to_anchor=(1, 1))


def draw_speeds(tables: Mapping[int, Sequence[dict[str, Any]]], path: Path) -> None:
    """Every run's throughput, a row for each mode and a mark for each batch size."""
    names = list(dict.fromkeys(label(r) for records in tables.values() for r in records))
    with _figure(path, (7.2, 0.6 + 0.3 * len(names))) as axes:
        for number, (batch_size, records) in enumerate(sorted(tables.items())):
            points = [
                (speed, names.index(label(record)))
                for record in records
                for speed in record["runs_tokens_per_s"]
            ]
            axes.plot(
                *zip(*points, strict=True),
                linestyle="",
                marker="os^Dv"[number % 5],
                markersize=5,
                fillstyle="none",
                color=_COLORS[number],
                label=f"batch {batch_size}",
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(
            "output tokens/s of all requests together, prefill included; a mark is a run"
        )
        axes.legend(frameon=False, ncols=len(tables), loc="lower right", bbox_to_anchor=(1, 1))


@contextmanager
def _figure(path: Path, inches: tuple[float, float]) -> Iterator[Axes]:
    """A figure of one panel, which the end of the block writes."""
    with _panels(path, inches, 1) as (axes,):
        yield axes


@contextmanager
def _panels(path: Path, inches: tuple[float, float], number: int) -> Iterator[list[Axes]]:
    """Panels one below the other; equal data make equal files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC):
        figure = Figure(figsize=inches, layout="constrained")
        panels = list(figure.subplots(number, 1, squeeze=False, sharex=True)[:, 0])
        yield panels
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
    # Matplotlib ends some lines with a space.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


Bars = dict[str, dict[str, tuple[float, float, float]]]
"""Of each mode, a value of each category with its lowest and highest."""


def draw_real_model(folder: Path, figures: Path) -> list[Path]:
    """Acceptance length and speed-up of a real model by category; none without result files.

    Acceptance is float32's where it was measured, speed that of bfloat16, one request at a time.
    """
    greedy = [file for file in read_real_files(folder) if file.temperature == 0]
    fast = {file.workload: file for file in greedy if (file.dtype, file.batch_size) == SPEED}
    exact = {file.workload: file for file in greedy if file.dtype == "float32"}
    lengths = _merged((fast | exact).values(), _length)
    if not lengths:
        return []
    speeds = _merged(fast.values(), _speedup)
    path = figures / "real-model.svg"
    panels = [lengths, speeds] if speeds else [lengths]
    with _panels(path, (7.2, 0.9 + 2.2 * len(panels)), len(panels)) as axes:
        names = list(dict.fromkeys(name for mode in lengths.values() for name in mode))
        for panel, bars in zip(axes, panels, strict=True):
            _draw_bars(panel, names, list(lengths), bars)
        axes[-1].set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes[0].set_ylabel("acceptance length\n(tokens per decoding step)")
        axes[0].legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        if speeds:
            axes[1].set_ylabel("decoding over plain\n(whiskers: any two runs)")
    return [path]


def _merged(
    files: Iterable[RealFile], figure: Callable[[CategoryResult], tuple[float, float, float] | None]
) -> Bars:
    """The figure of each category of Spec-Bench, and of the other workloads as a whole."""
    bars: Bars = {}
    for file in sorted(files, key=lambda file: list(WORKLOADS).index(file.workload)):
        plain = plain_record(file.records)
        for record in file.records:
            results = summarize(record, plain)
            for result in results if file.workload == "spec-bench" else results[-1:]:
                value = None if record is plain else figure(result)
                is_whole = result is results[-1]
                whole = WORKLOADS[file.workload] + ", all" * (len(results) > 1)
                name = whole if is_whole else result.category
                if value is not None:
                    bars.setdefault(label(record), {})[name] = value
    return bars


def _length(result: CategoryResult) -> tuple[float, float, float] | None:
    length = result.acceptance_length
    return None if length is None else (length, length, length)


def _speedup(result: CategoryResult) -> tuple[float, float, float] | None:
    speeds = result.speeds
    return None if speeds is None else (speeds.speedup, *speeds.speedup_range)


def _draw_bars(axes: Axes, names: Sequence[str], modes: Sequence[str], bars: Bars) -> None:
    """Groups of bars with whiskers; a mode has the same colour and place in every panel."""
    width = 0.8 / len(modes)
    for number, mode in enumerate(modes):
        found = [(i, bars[mode][n]) for i, n in enumerate(names) if n in bars.get(mode, {})]
        values = [value for _, (value, _, _) in found]
        lows = [value - low for _, (value, low, _) in found]
        highs = [high - value for _, (value, _, high) in found]
        axes.bar(
            [i + (number - (len(modes) - 1) / 2) * width for i, _ in found],
            values,
            width,
            yerr=[lows, highs] if any(lows) or any(highs) else None,
            error_kw={"linewidth": 0.6, "ecolor": "#333333"},
            color=_COLORS[number % len(_COLORS)],
            hatch=("", "///", "...", "xxx")[number % 4],
            edgecolor="white",
            linewidth=0,
            label=mode.removeprefix("layerskip, "),
        )
    axes.axhline(1, color="#666666", linewidth=0.8)


def draw_figures(results: Path, folder: Path) -> list[Path]:
    """Write all figures to a folder; returns their paths.

    Args:
        results: folder of the result files of ``benchmarks.prompts.real_prompts``.
    """
    one, four = (load(results / f"functions-b{size}.json") for size in (1, 4))
    paths = [folder / "acceptance-by-module.svg", folder / "speed-by-mode.svg"]
    draw_acceptance(one, paths[0])
    draw_speeds({1: one, 4: four}, paths[1])
    return paths
