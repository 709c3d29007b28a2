# SPDX-License-Identifier: Apache-2.0
"""A job's folder. It holds the job's settings, so that a later run goes on with the same job.

Nothing is made or removed in it before there is an answer: a start that fails leaves it as it was.
"""

from __future__ import annotations

import fcntl
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from vllm_layerskip.batch.rows import TEXT_FIELD
from vllm_layerskip.batch.settings import JobSettings
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import UNFINISHED, write_json

SETTINGS = "settings.json"
ANSWERS = "answers.partial.jsonl"
ALL_ANSWERS = "answers.jsonl"
"""The same, once every row has its answer."""
SUMMARY = "summary.json"
_OUTPUTS = ("output.jsonl", "output.parquet")


def check(folder: Path, settings: JobSettings, overwrite: bool) -> bool:
    """See that a job may write to the folder.

    Returns:
        Whether there is an earlier run to go on with.

    Raises:
        UserError: the folder is another job's and not to be overwritten, or no job's and not empty,
            or it cannot be written to.
    """
    path = folder / SETTINGS
    try:
        _check_writable(folder)
        _check_nobody_writes(folder)
        is_jobs = path.exists()
        found = None
        if is_jobs and not overwrite:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        others = folder.exists() and not is_jobs and set(folder.iterdir()) - set(_drafts(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--output {folder}: {error}. Choose another folder.") from None
    if others:
        raise UserError(
            f"--output {folder}: it is not empty and no earlier run's. Choose another folder."
        )
    if found is None:
        return False
    _check_equal(folder, found, _as_written(settings))
    return True


def _check_writable(folder: Path) -> None:
    """Try to write a nameless file, to the nearest folder that exists."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass


def _check_nobody_writes(folder: Path) -> None:
    for name in (ANSWERS, ALL_ANSWERS):
        if (folder / name).exists():
            with (folder / name).open("rb") as answers:
                lock(answers, folder)


def lock(answers: IO[bytes], folder: Path) -> None:
    """Keep other processes from writing answers to the folder, until the file is closed.

    Raises:
        UserError: another process writes them.
    """
    try:
        fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--output {folder}: another run writes to it. Wait for its end, or choose another "
            "folder."
        ) from None
    except OSError:
        pass  # A file system without locks.


def _as_written(settings: JobSettings) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    if settings.text_field == TEXT_FIELD:
        del written["text_field"]  # Earlier versions had no other.
    return written


def _check_equal(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = dict.fromkeys([*wanted, *found])
    different = [name for name in names if _comparable(found, name) != _comparable(wanted, name)]
    if different:
        pairs = [f"{n} {found.get(n)!r:.200}, and now {wanted.get(n)!r:.200}" for n in different]
        raise UserError(
            f"--output {folder} holds answers of a run with other settings: {'; '.join(pairs)}. "
            "Give those to go on, another folder, or --overwrite to begin anew."
        )


def _comparable(settings: Mapping[str, Any], name: str) -> Any:
    """A setting's value; of the input what is in the files, wherever they are."""
    value = settings.get(name)
    return [digest for _, digest in value or ()] if name == "input" else value


def claim(folder: Path, settings: JobSettings, overwrite: bool = False) -> None:
    """Make ``folder`` this job's.

    Raises:
        UserError: as ``check`` does, which was before the engines started.
    """
    goes_on = check(folder, settings, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            clear(folder)
        for draft in _drafts(folder):
            draft.unlink()
        if not goes_on:
            write_json(folder / SETTINGS, _as_written(settings))
    except OSError as error:
        raise UserError(f"--output {folder}: {error}. Choose another folder.") from None


def clear(folder: Path) -> None:
    """Remove what a job left in its folder, and nothing else."""
    if not (folder / SETTINGS).exists():
        return
    for draft in _drafts(folder):
        draft.unlink()
    for name in (ANSWERS, ALL_ANSWERS, *_OUTPUTS, SUMMARY, SETTINGS):
        (folder / name).unlink(missing_ok=True)


def written_without_answers(folder: Path) -> list[Path]:
    """Outputs that are there, though the answers that they were written from are not."""
    if (folder / ALL_ANSWERS).exists() or (folder / ANSWERS).exists():
        return []
    return [folder / name for name in _OUTPUTS if (folder / name).exists()]


def _drafts(folder: Path) -> Iterator[Path]:
    """Files of ours that a killed run left half-written."""
    for name in (SETTINGS, *_OUTPUTS, SUMMARY):
        yield from folder.glob(f".{name}.*{UNFINISHED}")
