# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole or not at all.

A reader of the path finds the old content or the new one, also after a crash.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a draft beside ``path`` to write to; without an error it replaces ``path``.

    The new file has the permissions of the old one. A process that is killed leaves its draft,
    whose name ends with ``UNFINISHED``. A pipe or a device (``/dev/stdout``) cannot be replaced and
    is written to as it is.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` in one step.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Replace ``path`` in one step by JSON that ends with a line break.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    write_text(path, json.dumps(content, indent=indent) + "\n")


def replace_folder(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``, on the same file system; an older ``target`` is removed.

    A crash may leave the older folder under a hidden name and no ``target``, never a part of one.
    The next call removes it.
    """
    outdated = target.with_name(f"{UNFINISHED}-{target.name}-outdated")
    if target.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(target, outdated)
    os.replace(source, target)
    if outdated.exists():  # Also an earlier call's, which a crash ended between the two steps.
        shutil.rmtree(outdated)
