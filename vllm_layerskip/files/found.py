# SPDX-License-Identifier: Apache-2.0
"""Which files the paths of a user mean: files, folders and patterns.

The end of a name is a file's format. A file of another format is never read as text: a table of
commas would be taken for a document.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllm_layerskip.errors import UserError

logger = logging.getLogger("vllm_layerskip.files")

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (
    ".txt", ".text", ".md", ".rst", ".tex",
    ".c", ".cc", ".cpp", ".cu", ".go", ".h", ".hpp", ".java", ".js", ".py", ".rs", ".sh", ".ts",
)  # fmt: skip
FORMATS = (*JSON_LINES, ".json", ".parquet", *TEXT)
_GZIP = ".gz"
VALID = (
    ".jsonl, .ndjson, .json, .parquet or .txt (or as other texts do: .md, .py...), all but "
    ".parquet also compressed as .gz"
)
"""For messages."""


def format_of(file: Path) -> str | None:
    """The format of a file by its name, one of ``FORMATS``; None if it is another."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    gzipped = suffixes[-1:] == [_GZIP]
    suffix = (suffixes[:-1] if gzipped else suffixes)[-1:]
    if not suffix or suffix[0] not in FORMATS or (gzipped and suffix[0] == ".parquet"):
        return None
    return suffix[0]


def is_gzipped(file: Path) -> bool:
    return file.suffix.lower() == _GZIP


def record_files(paths: Iterable[str | Path], source: str) -> list[Path]:
    """The files that paths, folders and patterns (``parts/*/p.jsonl``, ``**``) name, each once.

    A path that exists is no pattern, whatever signs are in it. Files of folders and patterns come
    in the order of their names, without hidden ones.

    Args:
        source: the option or key that holds the paths, for messages.

    Raises:
        UserError: a path names no file, or a file is of an unknown format.
    """
    files: list[Path] = []
    for path in map(str, paths):
        try:
            files += _files_of(path, source)
        except OSError as error:  # A text of many words, for instance.
            short = path if len(path) <= 80 else f"{path[:80]}..."
            raise UserError(f"{source} {short}: {error.strerror}. Correct the path.") from None
    return list(dict.fromkeys(files))


def _files_of(path: str, source: str) -> list[Path]:
    if not path:
        raise UserError(f"{source} '': the path is empty. Give files, folders or patterns.")
    if Path(path).is_dir():
        return _files_of_folder(Path(path), source)
    if Path(path).exists():
        return [_checked(Path(path), source)]
    files = [
        file
        for item in _matches(path)
        for file in (_visible_files(item) if item.is_dir() else [_checked(item, source)])
    ]
    if not files:
        what = "no file matches" if glob.has_magic(path) else "there is no such file or folder"
        raise UserError(
            f"{source} {path}: {what}. Give files, folders or patterns of files that end with "
            f"{VALID}."
        )
    return files


def _matches(pattern: str) -> list[Path]:
    """Files and folders that match, by name. Folders that exist may have any signs in their
    names."""
    folder = next(parent for parent in Path(pattern).parents if parent.is_dir())
    rest = str(Path(pattern).relative_to(folder))
    found = [
        folder / name for name in sorted(glob.glob(rest, root_dir=folder, recursive=True)) if name
    ]
    if Path(pattern).name == "**":  # Folders bring their files.
        found = [folder, *found] if rest == "**" else found
        return [item for item in found if item.is_dir()]
    return found


def _files_of_folder(folder: Path, source: str) -> list[Path]:
    files = _visible_files(folder)
    if not files:
        raise UserError(
            f"{source} {folder}: there is no file in it that can be read. Give files that end with "
            f"{VALID}."
        )
    return files


def _visible_files(folder: Path) -> list[Path]:
    visible = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not _is_hidden(file.relative_to(folder).parts)
    ]
    _warn_of_unknown(folder, [file for file in visible if format_of(file) is None])
    return [file for file in visible if format_of(file) is not None]


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in parts)


def _warn_of_unknown(folder: Path, files: Sequence[Path]) -> None:
    if files:
        logger.warning(
            "%s: %d file(s) of unknown formats are left out, %s first.",
            folder,
            len(files),
            files[0].name,
        )


def _checked(file: Path, source: str) -> Path:
    if format_of(file) is None:
        raise UserError(
            f"{source} {file}: unknown format. Its name must end with {VALID}. Rename or convert "
            "it."
        )
    return file
