# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    # A log's bars and line ends must not become columns and rows.
    clean = [[" ".join(text.replace("|", "/").split()) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in clean)
