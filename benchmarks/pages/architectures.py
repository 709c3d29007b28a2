# SPDX-License-Identifier: Apache-2.0
"""Make the table of docs/models.md again: the supported architectures.

python -m benchmarks.pages.architectures
"""

from __future__ import annotations

from benchmarks.engines.command_line import make_parser
from benchmarks.pages.tables import ROOT, Tables, write_tables
from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES

PAGE = ROOT / "docs" / "models.md"


def table() -> str:
    """A Markdown table with a row for each class; architectures of one class share a row."""
    names: dict[str, list[str]] = {}
    models = {}
    for name, model in SUPPORTED_ARCHITECTURES.items():
        names.setdefault(model.architecture, []).append(f"`{name}`")
        models[model.architecture] = model
    rows = [
        f"| {', '.join(names[key])} | {model.families} | {model.differs} |"
        for key, model in models.items()
        if model.vllm is not None
    ]
    header = "| `architectures` in config.json | models | differs from Llama by |"
    return "\n".join([header, "|---|---|---|", *rows])


TABLES: Tables = {"architectures": table}


def main() -> None:
    make_parser(__doc__).parse_args()
    write_tables(PAGE, TABLES)
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
