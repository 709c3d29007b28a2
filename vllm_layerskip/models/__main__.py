# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_layerskip.models``: the table of supported architectures.

``--write FILE`` replaces the table in a Markdown file, between the two markers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES

BEGIN = "<!-- table: python -m vllm_layerskip.models --write docs/models.md -->"
END = "<!-- end of table -->"


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


def with_table(text: str) -> str:
    """``text`` with the table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The file must have the lines {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_layerskip.models")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in FILE")
    file = parser.parse_args().write
    if file is None:
        print(table())
    else:
        file.write_text(with_table(file.read_text()))


if __name__ == "__main__":
    main()
