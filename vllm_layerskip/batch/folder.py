# SPDX-License-Identifier: Apache-2.0
"""A job's folder. It holds the job's settings, so that a later run goes on with the same job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_layerskip.batch.settings import JobSettings
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import UNFINISHED, write_json

SETTINGS = "settings.json"
ANSWERS = "answers.partial.jsonl"
SUMMARY = "summary.json"
_OUTPUTS = ("output.jsonl", "output.parquet")


def claim(folder: Path, settings: JobSettings) -> bool:
    """Make ``folder`` this job's, or see that it is.

    Returns:
        Whether there is an earlier run to go on with.

    Raises:
        UserError: the folder is another job's, or it is no job's and not empty.
    """
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(asdict(settings)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"--output {folder}: {error}. Choose another folder.") from None
    if found is None:
        if set(folder.iterdir()) - set(_drafts(folder)):
            raise UserError(
                f"--output {folder}: it is not empty and no earlier run's. Choose another folder."
            )
        write_json(path, wanted)
        return False
    _check_equal(folder, found, wanted)
    for draft in _drafts(folder):
        draft.unlink()
    return True


def _check_equal(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        lines = [f"  {n}: {found.get(n)!r:.200}, and now {wanted[n]!r:.200}" for n in different]
        raise UserError(
            f"--output {folder} holds answers of a run with other settings:\n"
            + "\n".join(lines)
            + "\nGive those to go on, another folder, or --overwrite to begin anew."
        )


def clear(folder: Path) -> None:
    """Remove what a job left in its folder, and nothing else."""
    if not (folder / SETTINGS).exists():
        return
    for draft in _drafts(folder):
        draft.unlink()
    for name in (ANSWERS, *_OUTPUTS, SUMMARY, SETTINGS):
        (folder / name).unlink(missing_ok=True)


def _drafts(folder: Path) -> Iterator[Path]:
    """Files of ours that a killed run left half-written."""
    for name in (SETTINGS, *_OUTPUTS, SUMMARY):
        yield from folder.glob(f".{name}.*{UNFINISHED}")
