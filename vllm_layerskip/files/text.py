# SPDX-License-Identifier: Apache-2.0
"""Text files that a command line or a configuration file names."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from vllm_layerskip.errors import UserError


def text_files(paths: Sequence[str | Path], source: str) -> list[Path]:
    """Files, and the visible text files of folders, in a fixed order.

    Args:
        source: the option or key that holds the paths, for messages.

    Raises:
        UserError: a path does not exist, or there is no text file at all.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            visible = (file for file in sorted(path.rglob("*")) if _is_visible(file, path))
            files += [file for file in visible if _begins_as_text(file)]
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{source} {path}: there is no such file or folder.")
    if not files:
        raise UserError(f"{source} {' '.join(map(str, paths))}: there is no text file in it.")
    return files


def _is_visible(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden


def _begins_as_text(file: Path) -> bool:
    with file.open("rb") as content:
        beginning = content.read(8192)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return False
    return b"\0" not in beginning
