# SPDX-License-Identifier: Apache-2.0
"""Plots of result files: ``python -m benchmarks.pages.plots benchmarks/results/7b-cnndm.json``.

For each file and model two figures, as PNG and SVG: speed-up over plain decoding with its limit,
and tokens/s, both over the batch size; one panel for each prompt length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.decode.summary import DecodeResult, decode_results, model_name
from benchmarks.engines.command_line import make_parser, mistakes_reported
from benchmarks.engines.results import load_existing
from benchmarks.serve.summary import is_serve_record

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, for every kind of colour vision; markers differ too.
_STYLES = {
    "plain": ("#000000", "o"),
    "layerskip": ("#D55E00", "s"),
    "layerskip-no-reuse": ("#E69F00", "D"),
    "draft-model": ("#0072B2", "^"),
    "ngram": ("#009E73", "v"),
    "early-exit": ("#CC79A7", "P"),
    "transformers": ("#999999", "X"),
    "transformers-assistant": ("#56B4E9", "*"),
}
_RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-layerskip",  # The same data make the same file.
}
_LINE_STYLES = ("-", "--", "-.")  # For one mode at several K.
_PANEL_INCHES = (3.4, 3.2)  # A paper's column.

Value = Callable[[DecodeResult], float | None]


def plot_file(path: Path, folder: Path) -> list[Path]:
    """Write the figures of one result file to ``folder``; returns their paths.

    Raises:
        UserError: the file does not exist, or is no result file.
    """
    records = [r for r in load_existing(path) if r["status"] == "ok" and not is_serve_record(r)]
    written: list[Path] = []
    for name in sorted({model_name(record) for record in records}):
        table = decode_results(record for record in records if model_name(record) == name)
        stem = folder / f"{path.stem}-{name}"
        written += _write_figures(table, name, stem)
    return written


def _write_figures(table: Sequence[DecodeResult], name: str, stem: Path) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context(_RC):
        figures = {"tokens": _figure(table, name, "tokens/s", lambda result: result.tokens_per_s)}
        if any(result.speedup for result in table):
            figures["speedup"] = _figure(
                table, name, "speed-up over plain", lambda result: result.speedup, _draw_limits
            )
        written = []
        for kind, figure in figures.items():
            for suffix in (".png", ".svg"):
                path = stem.with_name(f"{stem.name}-{kind}{suffix}")
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, metadata={"Date": None} if suffix == ".svg" else None)
                written.append(path)
    return written


def _figure(
    table: Sequence[DecodeResult],
    name: str,
    label: str,
    value: Value,
    draw_more: Callable[[Axes, Sequence[DecodeResult]], None] | None = None,
) -> Figure:
    from matplotlib import pyplot as plt

    prompt_lens = sorted({result.record["prompt_len"] for result in table})
    width, height = _PANEL_INCHES
    figure, panels = plt.subplots(
        1, len(prompt_lens), figsize=(width * len(prompt_lens), height), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, prompt_len in zip(panels[0], prompt_lens, strict=True):
        panel = [result for result in table if result.record["prompt_len"] == prompt_len]
        _draw_lines(axes, panel, value)
        if draw_more is not None:
            draw_more(axes, panel)
        batch_sizes = sorted({result.record["batch_size"] for result in panel})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batch_sizes, labels=[str(size) for size in batch_sizes])
        axes.set(title=f"{name}, {prompt_len}-token prompts", xlabel="batch size", ylabel=label)
        axes.set_ylim(bottom=0)
    legend: dict[str, Artist] = {}
    for axes in panels[0]:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(legend.values()), list(legend), loc="outside lower center", fontsize="x-small",
        ncols=2 * len(prompt_lens), columnspacing=1, handlelength=1.6,
    )  # fmt: skip
    plt.close(figure)
    return figure


def _draw_lines(axes: Axes, panel: Sequence[DecodeResult], value: Value) -> None:
    num_lines: Counter[str] = Counter()
    for (mode, setting), line in _lines(panel):
        line_style = _LINE_STYLES[num_lines[mode] % len(_LINE_STYLES)]
        num_lines[mode] += 1
        points = [(result.record["batch_size"], value(result)) for result in line]
        points = [(size, y) for size, y in points if y is not None]
        if points:
            color, marker = _STYLES[mode]
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                marker=marker,
                markersize=4,
                linestyle=line_style,
                linewidth=1.2,
                label=f"{mode} {setting}".strip(),
            )


def _draw_limits(axes: Axes, panel: Sequence[DecodeResult]) -> None:
    label: str | None = "dotted: limit (roofline)"
    for (mode, _), line in _lines(panel):
        points = [(r.record["batch_size"], r.speedup_limit) for r in line if r.speedup_limit]
        if points:
            axes.plot(*zip(*points, strict=True), color=_STYLES[mode][0], linestyle=":",
                      linewidth=1, label=label)  # fmt: skip
            label = None  # One entry in the legend for all limits.


def _lines(panel: Sequence[DecodeResult]) -> Iterable[tuple[tuple[str, str], list[DecodeResult]]]:
    """The results of each mode and setting, which make a line."""
    lines: dict[tuple[str, str], list[DecodeResult]] = {}
    for result in panel:
        lines.setdefault((result.mode, result.setting), []).append(result)
    return lines.items()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output-dir", type=Path, help="Default: beside each file.")
    args = parser.parse_args()
    with mistakes_reported(parser):
        for path in args.files:
            for written in plot_file(path, args.output_dir or path.parent):
                print(written)


if __name__ == "__main__":
    main()
