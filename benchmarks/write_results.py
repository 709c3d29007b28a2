# SPDX-License-Identifier: Apache-2.0
"""Make the tables and figures of docs/results.md out of the committed result files.

    python benchmarks/write_results.py

No number of that page stands without its file; ``tests/unit/test_results_page.py`` makes it again
and compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from check_tuning import compare
from matplotlib.figure import Figure
from pages import write_tables
from prompt_summary import ALL, label, summarize
from real_prompts import left_out, load, table
from report import markdown
from report import report as decode_report

from vllm_layerskip.tuning.cells import load_rows
from vllm_layerskip.tuning.tune import CELLS_FILE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "figures" / "acceptance-by-module.svg"
PROMPTS = ROOT / "benchmarks" / "results" / "real-prompts"
TUNING = ROOT / "docs" / "tuning" / "embedded-cpu"
SCORES = ROOT / "vllm_layerskip" / "checkpoint" / "scores.json"
# Paul Tol's bright scheme, which colour-blind readers can tell apart.
_COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44")


def checkpoint_table() -> str:
    """Acceptance length of every exit of checkpoint and twin."""
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    header = ("E", "accuracy", "K = 1", "K = 3", "K = 5", "K = 7", "twin, accuracy", "twin, K = 5")
    by_model = {
        name: (
            {e["exit_layer"]: e["accuracy"] for e in scores[name]["exits"]},
            {
                (s["exit_layer"], s["num_speculative_tokens"]): s["acceptance_length"]
                for s in scores[name]["speculation"]
            },
        )
        for name in ("layerskip", "twin")
    }
    (ours, lengths), (twin, twin_lengths) = by_model["layerskip"], by_model["twin"]
    rows = []
    for e in sorted({exit_layer for exit_layer, _ in lengths}):
        drafts = [f"{lengths[e, k]:.2f}" for k in (1, 3, 5, 7)]
        rows.append(
            [str(e), f"{ours[e]:.1%}", *drafts, f"{twin[e]:.1%}", f"{twin_lengths[e, 5]:.2f}"]
        )
    return markdown(header, rows)


def _prompts_table(name: str) -> Callable[[], str]:
    def made() -> str:
        records = load(PROMPTS / f"{name}.json")
        return "\n\n".join((table(records), _runs(records), left_out(records), _source(records)))

    return made


def _runs(records: Sequence[dict[str, Any]]) -> str:
    header = ("mode", "tokens/s of each run, prefill included")
    rows = [[label(r), ", ".join(f"{s:.1f}" for s in r["runs_tokens_per_s"])] for r in records]
    return markdown(header, rows)


def _source(records: Sequence[dict[str, Any]]) -> str:
    facts = records[0]["provenance"]
    gpu = facts["gpu"]
    machine = gpu["name"] if gpu else f"{facts['cpu']['count']} x {facts['cpu']['model']}"
    commit = facts["commit"]["id"] or "unknown"
    changed = ", with local changes" if facts["commit"]["dirty"] else ""
    versions = ", ".join(
        f"{name} {facts['versions'][name]}"
        for name in ("vllm", "torch", "python")
        if name in facts["versions"]
    )
    settings, questions = records[0]["settings"], records[0]["questions"]
    return (
        f"{questions['num_questions']} of {questions['of']} questions; {settings['dtype']}, batch "
        f"{settings['batch_size']}, {settings['repeats']} runs; {machine}; {versions}; commit "
        f"{commit[:7]}{changed}.\nAgain: `{facts['command']}`"
    )


def tuning_table() -> str:
    """The choice of `tune` beside the full sweep's best cells."""
    report = json.loads((TUNING / "choice" / "report.json").read_text(encoding="utf-8"))
    rows = load_rows(TUNING / "sweep" / CELLS_FILE)
    (found,) = compare(report, rows)
    from vllm_layerskip.tuning.cells import PLAIN, least_disturbed

    cells = least_disturbed(rows)
    best = sorted(
        (row for (cell, _), row in cells.items() if cell != PLAIN),
        key=lambda row: -row.tokens_per_s,
    )[:5]
    shown = dict.fromkeys([found.chosen, *best])
    body = [
        [
            str(row.exit_layer),
            str(row.num_speculative_tokens),
            "chosen" if row == found.chosen else "",
            f"{row.acceptance_length:.2f}",
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens_per_s / found.plain:.2f}",
            ", ".join(f"{r.tokens_per_s:.1f}" for r in rows if r.cell == row.cell),
        ]
        for row in shown
    ]
    header = ("E", "K", "", "acceptance length", "tokens/s", "over plain", "its rounds")
    verdict = (
        f"The choice is {100 * found.loss:.1f} % slower than the sweep's best cell. Plain "
        f"decoding: {found.plain:.1f} tokens/s."
    )
    return f"{markdown(header, body)}\n\n{verdict}"


def shape_table() -> str:
    """The 1B shape on a CPU, beside its byte limit."""
    text = decode_report(ROOT / "benchmarks" / "results" / "cpu-1b.json")
    # Its headings are the file's own.
    return "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()


def runners_table() -> str:
    """Model Runner V2 under the interpreter beside vLLM's V1 CPU runner."""
    path = ROOT / "benchmarks" / "results" / "cpu-runners.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [str(s["batch_size"]), f"{s['step_ms']['v1']:.1f}", f"{s['step_ms']['v2']:.1f}",
         f"{s['v2_to_v1']:.2f}"]
        for s in content["summary"]
    ]  # fmt: skip
    made = markdown(("batch", "V1, ms a step", "V2, ms a step", "ratio"), rows)
    return f"{made}\n\nAgain: `{content['provenance']['command']}`"


TABLES: dict[str, Callable[[], str]] = {
    "checkpoint": checkpoint_table,
    "functions-1": _prompts_table("functions-b1"),
    "functions-4": _prompts_table("functions-b4"),
    "spec-bench": _prompts_table("spec-bench-b1"),
    "tuning": tuning_table,
    "shape": shape_table,
    "runners": runners_table,
}


def draw_acceptance(path: Path) -> None:
    """Acceptance length by category, a bar for each (E, K)."""
    import matplotlib

    records = load(PROMPTS / "functions-b1.json")
    plain = next(record for record in records if record["mode"] == "plain")
    drafting = [record for record in records if record["mode"] == "layerskip"]
    results = [summarize(record, plain) for record in drafting]
    names = [result.category for result in results[0] if result.category != ALL]
    with matplotlib.rc_context({"svg.hashsalt": "layerskip", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(drafting)
        for number, (record, found) in enumerate(zip(drafting, results, strict=True)):
            by_name = {result.category: result.acceptance_length or 0 for result in found}
            axes.bar(
                [i + (number - (len(drafting) - 1) / 2) * width for i in range(len(names))],
                [by_name[name] for name in names],
                width,
                color=_COLORS[number],
                label=label(record),
            )
        axes.axhline(1, color="#BBBBBB", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("acceptance length\n(tokens a verification)")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    write_tables(PAGE, TABLES)
    draw_acceptance(FIGURE)
    print(f"Wrote {PAGE.relative_to(ROOT)} and {FIGURE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
