# SPDX-License-Identifier: Apache-2.0
"""``cells.csv``: a row for each measurement of an (E, K) at a batch size.

A measurement belongs to the settings that it was made under (model, prompts, engine, machine,
code). The column ``settings`` holds a digest of them; rows with another digest stay in the file and
are not used. The file is only appended to, a whole line at a time; a line that a crash cut off is
dropped. Files from before there were draft twins lack the last two columns; the first row that is
added gives them those.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.whole import whole_file
from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import Cell, DraftCell
from vllm_layerskip.twins.kinds import NONE

CELLS_FILE = "cells.csv"


@dataclass(frozen=True)
class Measurement:
    """What one engine did at one batch size. Plain decoding has E = K = 0."""

    settings_digest: str
    exit_layer: int
    num_speculative_tokens: int
    batch_size: int
    tokens_per_s: float
    """All requests together, in steady decoding; the median of the runs."""
    step_ms: float
    acceptance_length: float
    """Tokens a request and step, in the same window; 1 for plain decoding."""
    num_drafts: int
    num_accepted_tokens: int
    num_steps: int
    runs_tokens_per_s: str
    """Each run's speed, separated by spaces."""
    outputs: str
    """A digest of each prompt's output tokens, separated by spaces."""
    start_s: float
    """What the engine took to start."""
    draft_quantization: str = NONE
    draft_adapter: str = NONE
    """The digest of its content."""

    @property
    def cell(self) -> Cell:
        return self.exit_layer, self.num_speculative_tokens

    @property
    def draft(self) -> Draft:
        return Draft(self.draft_quantization, self.draft_adapter)

    @property
    def draft_cell(self) -> DraftCell:
        return DraftCell(self.draft, self.cell)

    def to_dict(self) -> dict[str, Any]:
        """Values by their names in files."""
        return {_in_files(name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """The measurement that ``to_dict`` gave, also before there were draft twins."""
        names = {field.name: _in_files(field.name) for field in fields(cls)}
        return cls(**{name: values[key] for name, key in names.items() if key in values})


def _in_files(name: str) -> str:
    return "settings" if name == "settings_digest" else name


_TYPES = {_in_files(field.name): {"int": int, "float": float, "str": str}[str(field.type)]
          for field in fields(Measurement)}  # fmt: skip
"""Columns of the file, in its order."""
_OLD_COLUMNS = [name for name in _TYPES if name not in ("draft_quantization", "draft_adapter")]
"""Columns of files from before there were draft twins."""


def output_digest(token_ids: Iterable[int]) -> str:
    """The first digits of a SHA-256 over a prompt's output."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:10]


def load_measurements(path: Path) -> list[Measurement]:
    """The whole rows of a file; none if there is no file.

    Raises:
        UserError: the file is something else.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: it cannot be read ({error}). Choose another --results.") from None
    lines = content.splitlines(keepends=True)
    columns = next(csv.reader(lines[:1]), list(_TYPES))
    if columns not in (list(_TYPES), _OLD_COLUMNS) or (lines and not lines[0].endswith("\n")):
        if len(lines) == 1 and not lines[0].endswith("\n"):
            return []  # Cut off within the header.
        raise UserError(
            f"{path}: this is no file of measured cells, or one of another version. Move it away, "
            "or choose another --results."
        )
    return [found for line in lines[1:] if (found := _parse(line, columns)) is not None]


def _parse(line: str, columns: Sequence[str]) -> Measurement | None:
    values = next(csv.reader([line]), [])
    if not line.endswith("\n") or len(values) != len(columns):
        return None
    try:
        converted = {name: _TYPES[name](value) for name, value in zip(columns, values, strict=True)}
    except ValueError:
        return None
    return Measurement.from_dict(converted)


def append_measurements(path: Path, measurements: Iterable[Measurement]) -> None:
    """Add rows; a cut-off last line goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _add_columns(path)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(_TYPES), lineterminator="\n")
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole == 0:
        writer.writeheader()
    writer.writerows(measurement.to_dict() for measurement in measurements)
    with path.open("r+b" if content else "wb") as file:
        file.truncate(whole)
        file.seek(whole)
        file.write(lines.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def _add_columns(path: Path) -> None:
    """Give a file from before there were draft twins the columns of today."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if next(csv.reader(lines[:1]), None) != _OLD_COLUMNS:
        return
    old = [found for line in lines[1:] if (found := _parse(line, _OLD_COLUMNS)) is not None]
    with whole_file(path) as draft:
        append_measurements(draft, old)


def least_disturbed(
    measurements: Iterable[Measurement],
) -> dict[tuple[DraftCell, int], Measurement]:
    """The fastest measurement of each cell, by cell and batch size.

    A cell decodes the same steps in every round, and whatever else a machine does only slows them
    down. On a shared machine such a disturbance lasts for seconds to minutes: it hits a whole round
    or none of it, so the fastest round says most about the cell.
    """
    fastest: dict[tuple[DraftCell, int], Measurement] = {}
    for measurement in measurements:
        key = (measurement.draft_cell, measurement.batch_size)
        if key not in fastest or measurement.tokens_per_s > fastest[key].tokens_per_s:
            fastest[key] = measurement
    return fastest


def num_equal_outputs(measurement: Measurement, plain: Measurement) -> tuple[int, int]:
    """How many prompts' outputs equal plain decoding's, and of how many."""
    pairs = list(zip(measurement.outputs.split(), plain.outputs.split(), strict=True))
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)
