# SPDX-License-Identifier: Apache-2.0
"""Tables of documents that a command makes: each between two comments.

The first is ``<!-- table: NAME -->``, the second ``<!-- end of table -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from vllm_layerskip.files.whole import write_text

ROOT = Path(__file__).parents[2]
Tables = Mapping[str, Callable[[], str]]

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end of table -->)", re.DOTALL)


def with_tables(page: str, tables: Tables) -> str:
    """The page with new tables.

    Raises:
        ValueError: the page has other tables than ``tables``.
    """
    names = [match[2] for match in _TABLE.finditer(page)]
    if sorted(names) != sorted(tables):
        raise ValueError(f"The page has the tables {names}, and there are {list(tables)}.")
    return _TABLE.sub(lambda match: f"{match[1]}\n{tables[match[2]]()}\n{match[3]}", page)


def write_tables(path: Path, tables: Tables) -> None:
    """Replace a page's tables by new ones."""
    write_text(path, with_tables(path.read_text(encoding="utf-8"), tables))
