# SPDX-License-Identifier: Apache-2.0
"""Make the tables and figures of docs/results.md out of the committed result files.

    python -m benchmarks.pages.write_results

Results of a real model, which ``benchmarks.pages.real_model`` names, come first; what the embedded
checkpoint shows is an appendix then.

Every number of its tables comes from a file; ``tests/unit/benchmarks/test_results_page.py`` makes
tables and figures again and compares them with the committed ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.engines.command_line import make_parser
from benchmarks.engines.markdown import markdown
from benchmarks.engines.results import command_today
from benchmarks.pages.check_tuning import Comparison, compare
from benchmarks.pages.figures import draw_figures, draw_real_model
from benchmarks.pages.real_model import arranged, real_tables
from benchmarks.pages.report import report as decode_report
from benchmarks.pages.sources import source
from benchmarks.pages.tables import ROOT, Tables, with_tables
from benchmarks.prompts.records import load
from benchmarks.prompts.summary import label, runs_spread, speedup_range, summarize
from benchmarks.prompts.tables import category_table, equal_answers, left_out, two_digits
from vllm_layerskip.files.whole import write_text
from vllm_layerskip.tuning.cells import (
    CELLS_FILE,
    Measurement,
    least_disturbed,
    load_measurements,
)
from vllm_layerskip.tuning.grid import PLAIN_DECODING

PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures"
RESULTS = ROOT / "benchmarks" / "results"
PROMPTS = RESULTS / "real-prompts"
REAL_MODEL = RESULTS / "real-model"
TUNING = ROOT / "docs" / "tuning" / "embedded-cpu"
SCORES = ROOT / "vllm_layerskip" / "checkpoint" / "scores.json"
LARGEST_SPREAD = 0.2
"""If a mode's runs spread more, the few runs of a category say nothing about speed."""


def checkpoint_table() -> str:
    """Accuracy of every exit of checkpoint and twin, and the acceptance lengths of its drafts."""
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    ours, twin = scores["layerskip"], scores["twin"]
    num_drafts = list(ours["acceptance_length"]["E=1"])
    header = ("E", "accuracy", *(name.replace("=", " = ") for name in num_drafts),
              "twin, accuracy", f"twin, {num_drafts[-1].replace('=', ' = ')}")  # fmt: skip
    body = []
    for our_exit, twin_exit in zip(ours["exits"], twin["exits"], strict=True):
        e = our_exit["exit_layer"]
        # The last exit is the whole model, which drafts nothing.
        lengths = ours["acceptance_length"].get(f"E={e}", {})
        twin_lengths = twin["acceptance_length"].get(f"E={e}", {})
        body.append(
            [
                str(e),
                f"{our_exit['accuracy']:.1%}",
                *(two_digits(lengths.get(k)) for k in num_drafts),
                f"{twin_exit['accuracy']:.1%}",
                two_digits(twin_lengths.get(num_drafts[-1])),
            ]
        )
    return markdown(header, body)


def _prompts_table(name: str) -> Callable[[], str]:
    def made() -> str:
        records = load(PROMPTS / f"{name}.json")
        parts = (
            _modes(records),
            category_table(records, speedups=_is_steady(records)),
            left_out(records),
            source(f"benchmarks/results/real-prompts/{name}.json", records),
        )
        return "\n\n".join(parts)

    return made


def _is_steady(records: Sequence[dict[str, Any]]) -> bool:
    return all(runs_spread(record) <= LARGEST_SPREAD for record in records)


def _modes(records: Sequence[dict[str, Any]]) -> str:
    """A row for each mode, over all categories."""
    plain = next(record for record in records if record["mode"] == "plain")
    header = ("mode", "acceptance length", "equal to plain", "tokens/s of each run", "speed-up",
              "any two runs", "of decoding")  # fmt: skip
    body = []
    for record in records:
        result = summarize(record, plain)[-1]
        slowest, fastest = speedup_range(record, plain)
        columns = [
            label(record),
            two_digits(result.acceptance_length),
            equal_answers(result),
            ", ".join(f"{speed:.1f}" for speed in record["runs_tokens_per_s"]),
        ]
        if record is not plain:
            columns += [
                two_digits(result.speedup),
                f"{slowest:.2f} to {fastest:.2f}",
                two_digits(result.decoding_speedup),
            ]
        body.append(columns + [""] * (len(header) - len(columns)))
    if _is_steady(records):
        return markdown(header, body)
    note = (
        f"Runs of one mode differ by up to {max(map(runs_spread, records)):.0%}: other work on the "
        "machine. So no speed-up is given by category, and two modes whose ranges overlap are not "
        "told apart."
    )
    return f"{markdown(header, body)}\n\n{note}"


def tuning_table() -> str:
    """The choice of `tune` beside the full sweep's best cells."""
    if not (TUNING / "sweep").exists():
        return "No run is committed yet."
    report = json.loads((TUNING / "choice" / "report.json").read_text(encoding="utf-8"))
    digests = {row["settings"] for row in report["measured"]}
    rows = [
        row
        for row in load_measurements(TUNING / "sweep" / CELLS_FILE)
        if row.settings_digest in digests
    ]
    return "\n\n".join(_tuning_at(found, rows) for found in compare(report, rows))


def _tuning_at(found: Comparison, rows: Sequence[Measurement]) -> str:
    rows = [row for row in rows if row.batch_size == found.batch_size]
    cells = [row for (cell, _), row in least_disturbed(rows).items() if cell != PLAIN_DECODING]
    best = sorted(cells, key=lambda row: row.tokens_per_s, reverse=True)[:5]
    body = [
        [
            str(row.exit_layer),
            str(row.num_speculative_tokens),
            " ".join(_marks(row, found)),
            f"{row.acceptance_length:.2f}",
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens_per_s / found.plain:.2f}",
            ", ".join(f"{r.tokens_per_s:.1f}" for r in rows if r.draft_cell == row.draft_cell),
        ]
        for row in dict.fromkeys([found.chosen, *best])
    ]
    header = ("E", "K", "", "acceptance length", "tokens/s", "over plain", "its rounds")
    verdict = (
        f"Batch {found.batch_size}: the choice is {found.loss:.1%} slower than the best of the "
        f"sweep's {len(cells)} cells. Plain decoding: {found.plain:.1f} tokens/s."
    )
    return f"{markdown(header, body)}\n\n{verdict}"


def _marks(row: Measurement, found: Comparison) -> Iterator[str]:
    if row.draft.has_twin:
        yield row.draft.name
    if row == found.chosen:
        yield "chosen"


def _shape_table(name: str) -> Callable[[], str]:
    """A shape on a CPU, with and without draft twins, beside their byte limits."""

    def table() -> str:
        text = decode_report(RESULTS / f"{name}.json")
        # Without its headings, which name the file and the model.
        return "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()

    return table


def runners_table() -> str:
    """Model Runner V2 under the interpreter beside vLLM's V1 CPU runner."""
    path = RESULTS / "cpu-runners.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [str(s["batch_size"]), f"{s['step_ms']['v1']:.1f}", f"{s['step_ms']['v2']:.1f}",
         f"{s['v2_to_v1']:.2f}"]
        for s in content["summary"]
    ]  # fmt: skip
    made = markdown(("batch", "V1, ms a step", "V2, ms a step", "ratio"), rows)
    return f"{made}\n\nAgain: `{command_today(content['provenance'])}`"


TABLES: Tables = {
    "checkpoint": checkpoint_table,
    "functions-1": _prompts_table("functions-b1"),
    "functions-4": _prompts_table("functions-b4"),
    "spec-bench": _prompts_table("spec-bench-b1"),
    "tuning": tuning_table,
    "shape-7b": _shape_table("twins-cpu-7b"),
    "shape-1b": _shape_table("twins-cpu-1b"),
    "shape-1b-all": _shape_table("twins-cpu-1b-all"),
    "runners": runners_table,
    **real_tables(REAL_MODEL),
}


def main() -> None:
    make_parser(__doc__).parse_args()
    page = arranged(PAGE.read_text(encoding="utf-8"), REAL_MODEL)
    write_text(PAGE, with_tables(page, TABLES))
    figures = [*draw_figures(PROMPTS, FIGURES), *draw_real_model(REAL_MODEL, FIGURES)]
    for path in (PAGE, *figures):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
