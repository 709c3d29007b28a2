# SPDX-License-Identifier: Apache-2.0
"""Tables of documents that a command makes, between ``<!-- table: NAME -->`` and an end mark."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

Tables = Mapping[str, Callable[[], str]]

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end of table -->)", re.DOTALL)


def with_tables(page: str, tables: Tables) -> str:
    """The page with its tables made again.

    Raises:
        ValueError: the page has other tables than ``tables``.
    """
    names = [match[2] for match in _TABLE.finditer(page)]
    if sorted(names) != sorted(tables):
        raise ValueError(f"The page has the tables {names}, and there are {list(tables)}.")
    return _TABLE.sub(lambda match: f"{match[1]}\n{tables[match[2]]()}\n{match[3]}", page)


def write_tables(path: Path, tables: Tables) -> None:
    """Make a page's tables again."""
    path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
