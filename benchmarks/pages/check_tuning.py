# SPDX-License-Identifier: Apache-2.0
"""Does a choice of `vllm-layerskip tune` hold against a full sweep?

    python -m benchmarks.pages.check_tuning CHOICE SWEEP

Both are results folders of `tune`; SWEEP was made with `--num-measured all` and the same settings.
For each batch size the chosen draft and E with their scheduled K are compared with the sweep's best
cell, both by the sweep's numbers. The exit status is 1 if the choice is more than 10 % slower at
any of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser, mistakes_reported
from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.tuning.cells import (
    CELLS_FILE,
    Measurement,
    least_disturbed,
    load_measurements,
)
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import PLAIN_DECODING, DraftCell
from vllm_layerskip.twins.kinds import NONE

TOLERANCE = 0.10


@dataclass(frozen=True)
class Comparison:
    """Measured speeds of the sweep at one batch size, in tokens/s."""

    batch_size: int
    plain: float
    best: Measurement
    chosen: Measurement

    @property
    def loss(self) -> float:
        """How much slower the chosen cell is than the best one, as a share."""
        return 1 - self.chosen.tokens_per_s / self.best.tokens_per_s

    def __str__(self) -> str:
        def figures(row: Measurement) -> str:
            ratio = row.tokens_per_s / self.plain
            return f"{row.draft_cell}, {row.tokens_per_s:.1f} tokens/s ({ratio:.3f} x plain)"

        return (
            f"batch {self.batch_size}: chosen {figures(self.chosen)}, best of the sweep "
            f"{figures(self.best)}: {100 * self.loss:.1f} % slower"
        )


def chosen_cell(report: dict[str, Any], batch_size: int) -> DraftCell:
    """The choice at a batch size; plain decoding where its schedule says so.

    Where drafting pays nowhere, the pair that loses the least stands in at the smallest batch
    size, which it was chosen for.
    """
    choice = report["choice"]
    drafts = 0
    for first, last, scheduled in choice["num_speculative_tokens_per_batch_size"]:
        if first <= batch_size <= last:
            drafts = scheduled
    if not choice["pays"] and batch_size == min(report["grid"]["batch_sizes"]):
        drafts = choice["num_speculative_tokens"]
    if not drafts:
        return PLAIN_DECODING
    return DraftCell(_draft_of(choice), (choice["exit_layer"], drafts))


def cells_of_grid(report: dict[str, Any]) -> list[DraftCell]:
    """Every draft with each E and K that it may have."""
    found = (
        DraftCell(_draft_of(row), (row["exit_layer"], row["num_speculative_tokens"]))
        for row in report["predictions"]
    )
    return list(dict.fromkeys(found))


def _draft_of(values: dict[str, Any]) -> Draft:
    """The draft that part of a report names; reports older than draft twins name none."""
    return Draft(values.get("draft_quantization", NONE), values.get("draft_adapter", NONE))


def compare(report: dict[str, Any], rows: Iterable[Measurement]) -> list[Comparison]:
    """A comparison for each batch size of the choice.

    Raises:
        UserError: the sweep lacks a cell of the report's grid.
    """
    by_cell = least_disturbed(rows)
    cells, comparisons = cells_of_grid(report), []
    for batch_size in report["grid"]["batch_sizes"]:
        missing = [c for c in (PLAIN_DECODING, *cells) if (c, batch_size) not in by_cell]
        if missing:
            names = ", ".join(map(str, missing))
            raise UserError(f"The sweep lacks {names} at batch size {batch_size}. Go on with it.")
        sweep = [by_cell[cell, batch_size] for cell in cells]
        comparisons.append(
            Comparison(
                batch_size,
                plain=by_cell[PLAIN_DECODING, batch_size].tokens_per_s,
                best=max(sweep, key=lambda row: row.tokens_per_s),
                chosen=by_cell[chosen_cell(report, batch_size), batch_size],
            )
        )
    return comparisons


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}. Give a results folder of tune.") from None


def compare_folders(choice: Path, sweep: Path) -> list[Comparison]:
    """A comparison for each batch size of the choice.

    Raises:
        UserError: a folder holds no results, or the two do not fit together.
    """
    report = _read_report(choice)
    settings = {row["settings"] for row in _read_report(sweep)["measured"]}
    if settings != {row["settings"] for row in report["measured"]}:
        raise UserError("The two were measured under different settings. Run both alike.")
    return compare(
        report, [r for r in load_measurements(sweep / CELLS_FILE) if r.settings_digest in settings]
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("choice", type=Path)
    parser.add_argument("sweep", type=Path)
    args = parser.parse_args()
    with mistakes_reported(parser):
        comparisons = compare_folders(args.choice, args.sweep)
    for comparison in comparisons:
        print(comparison)
    return int(any(comparison.loss > TOLERANCE for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
