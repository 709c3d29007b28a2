# SPDX-License-Identifier: Apache-2.0
"""Make the tables of docs/gpu.md out of the results that a GPU brought.

    python -m benchmarks.pages.write_gpu

``tests/unit/benchmarks/test_results_page.py`` makes them again and compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser
from benchmarks.engines.markdown import markdown
from benchmarks.pages.report import report as decode_report
from benchmarks.pages.tables import ROOT, Tables, write_tables

PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
FIRST_RUN = RESULTS / "h200-2026-11-27"


def exact_table(folder: Path = FIRST_RUN) -> str:
    """Tokens of LayerSkip's CUDA graphs beside plain decoding's."""
    found = json.loads((folder / "exact.json").read_text(encoding="utf-8"))
    header = ("dtype", "variant", "answers equal", "acceptance length", "verify steps reused / all",
              "replays: draft, verify", "new waits for the GPU")  # fmt: skip
    return markdown(header, (_check_columns(found["dtype"], one) for one in found["checks"]))


def _check_columns(dtype: str, check: dict[str, Any]) -> list[str]:
    reused, replays = check["num_reused"], check["num_replays"]
    return [
        dtype,
        check["variant"],
        f"{check['num_equal']} of {check['num_answers']}",
        f"{check['acceptance_length']:.2f}",
        f"{reused} / {reused + check['num_full']}",
        f"{replays['draft']}, {replays['verify']}",
        str(len(check["waits"])),
    ]


def first_table(folder: Path = FIRST_RUN) -> str:
    """The 7B shape: speeds beside their limits, engines, machine and versions."""
    text = decode_report(folder / "first-7b.json")
    # Without headings and commands: the page has one for the whole session.
    left_out = ("#", "* `")
    return "\n".join(line for line in text.splitlines() if not line.startswith(left_out)).strip()


TABLES: Tables = {"exact": exact_table, "first-7b": first_table}


def main() -> None:
    make_parser(__doc__).parse_args()
    write_tables(PAGE, TABLES)
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
