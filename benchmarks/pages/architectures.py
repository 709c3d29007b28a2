# SPDX-License-Identifier: Apache-2.0
"""The table of docs/models.md: the supported architectures.

python -m benchmarks.pages.architectures
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages.tables import Tables, write_tables
from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"


def table() -> str:
    """A Markdown table, a row for each class; what shares a class shares its row."""
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
    write_tables(PAGE, TABLES)
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
