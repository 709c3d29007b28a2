# SPDX-License-Identifier: Apache-2.0
"""What a job is: its settings, kept beside its answers, so that it goes on as what it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError

FILE = "settings.json"


@dataclass(frozen=True)
class JobSettings:
    """Everything that the answers depend on."""

    model: str
    speculative_config: Mapping[str, Any] | None
    engine_args: Mapping[str, Any]
    """Arguments of vLLM's engine, but for the two above."""
    sampling_params: Mapping[str, Any]
    input: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Name and digest of each input file."""


def file_digest(path: Path) -> str:
    """The first digits of a SHA-256 over a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def claim(folder: Path, settings: JobSettings) -> bool:
    """Make ``folder`` the job's, or see that it is.

    Returns:
        Whether there is an earlier run to go on with.

    Raises:
        UserError: the folder is another job's, or no job's and not empty.
    """
    path = folder / FILE
    wanted = json.loads(json.dumps(asdict(settings)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"--output {folder}: {error}. Choose another folder.") from None
    if found is None:
        if any(folder.iterdir()):
            raise UserError(
                f"--output {folder}: it is not empty and no earlier run's. Choose another folder."
            )
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return False
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        lines = [f"  {n}: {found.get(n)!r:.200}, and now {wanted[n]!r:.200}" for n in different]
        raise UserError(
            f"--output {folder} holds answers of a run with other settings:\n"
            + "\n".join(lines)
            + "\nGive those to go on, another folder, or --overwrite to begin anew."
        )
    return True


def clear(folder: Path) -> None:
    """Remove what a job left in its folder, and nothing else."""
    from vllm_layerskip.batch.output import PARTIAL

    if not (folder / FILE).exists():
        return
    for name in (FILE, PARTIAL, "output.jsonl", "output.parquet", "summary.json"):
        (folder / name).unlink(missing_ok=True)
