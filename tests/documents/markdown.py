# SPDX-License-Identifier: Apache-2.0
"""The documents' code blocks and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
NEEDS = re.compile(r"# needs (a GPU|GPUs|a cluster|an hour)\b")
"""First line of a block that a machine without GPUs cannot run, or not within minutes."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    document: str
    line: int
    language: str
    text: str

    @property
    def is_left_out(self) -> bool:
        """Whether its first line says that it needs more than a CPU and minutes."""
        return NEEDS.match(self.text) is not None

    @property
    def is_file(self) -> bool:
        """Whether it is the content of a file, which its first line names: ``# run.yaml``."""
        return re.match(r"# [\w/.-]+\.(py|yaml|toml|json)\n", self.text) is not None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """Everything that a user reads."""
    folders = [ROOT, ROOT / "docs", *sorted((ROOT / "examples").iterdir())]
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.md"))]
    return [*found, ROOT / "vllm_layerskip" / "checkpoint" / "README.md"]


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        indent = match["indent"]
        yield Block(
            document=path.relative_to(ROOT).as_posix(),
            line=text.count("\n", 0, match.start()) + 1,
            language=match["language"],
            text="\n".join(line.removeprefix(indent) for line in match["text"].split("\n")),
        )


def all_blocks() -> list[Block]:
    return [block for path in documents() for block in blocks(path)]


def links(path: Path) -> list[str]:
    """Link targets and pictures outside of code."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", path.read_text(encoding="utf-8")))
    return _LINK.findall(text)


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
