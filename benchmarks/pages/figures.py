# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.prompts.records import load
from benchmarks.prompts.summary import label, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, for every kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
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
    """A figure of one panel, which the end of the block writes; equal data make equal files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.subplots()
        yield axes
        axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
    # Matplotlib ends some lines with a space.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


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
