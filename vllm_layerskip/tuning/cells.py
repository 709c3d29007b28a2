# SPDX-License-Identifier: Apache-2.0
"""Measured cells: a CSV file with a row for each (E, K, batch size), and the way to resume it.

A row belongs to the settings it was measured under (model, prompts, engine, machine, code):
``settings`` is a digest of them, and rows of another digest are left alone and not used. The file
is only appended to, a whole line at a time; a line that a crash cut off is dropped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError

PLAIN = (0, 0)
"""The (E, K) of plain decoding."""


@dataclass(frozen=True)
class Row:
    """What one engine did at one batch size. Plain decoding has E = K = 0."""

    settings: str
    exit_layer: int
    num_speculative_tokens: int
    batch_size: int
    tokens_per_s: float
    """Of all requests together, in steady decoding; the median of the runs."""
    step_ms: float
    acceptance_length: float
    """Tokens a request and step, in the same window; 1 for plain decoding."""
    num_drafts: int
    num_accepted_tokens: int
    num_steps: int
    runs_tokens_per_s: str
    """Each run's, separated by spaces."""
    outputs: str
    """A digest of each prompt's output tokens, separated by spaces."""
    start_s: float
    """What the engine took to start."""

    @property
    def cell(self) -> tuple[int, int]:
        return self.exit_layer, self.num_speculative_tokens


_TYPES = {field.name: {"int": int, "float": float, "str": str}[str(field.type)]
          for field in fields(Row)}  # fmt: skip


def settings_digest(identity: Mapping[str, Any]) -> str:
    """The first digits of a SHA-256 over everything that a measurement depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def output_digest(token_ids: Iterable[int]) -> str:
    """The first digits of a SHA-256 over a prompt's output."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:10]


def load_rows(path: Path) -> list[Row]:
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
    if lines and next(csv.reader([lines[0]]), None) != list(_TYPES):
        if len(lines) == 1 and not lines[0].endswith("\n"):
            return []  # Cut off within the header.
        raise UserError(
            f"{path}: this is no file of measured cells, or one of another version. Move it away, "
            "or choose another --results."
        )
    return [row for line in lines[1:] if (row := _parse(line)) is not None]


def _parse(line: str) -> Row | None:
    values = next(csv.reader([line]), [])
    if not line.endswith("\n") or len(values) != len(_TYPES):
        return None
    try:
        converted = {
            name: kind(value) for (name, kind), value in zip(_TYPES.items(), values, strict=True)
        }
    except ValueError:
        return None
    return Row(**converted)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows; a cut-off last line goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(_TYPES), lineterminator="\n")
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole == 0:
        writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row))
    with path.open("r+b" if content else "wb") as file:
        file.truncate(whole)
        file.seek(whole)
        file.write(lines.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def least_disturbed(rows: Iterable[Row]) -> dict[tuple[tuple[int, int], int], Row]:
    """Of each cell and batch size the fastest row, by ((E, K), batch size).

    A cell decodes the same steps in every round, and whatever else a machine does only slows them
    down. On a shared machine such a disturbance lasts for seconds to minutes, so it is the round as
    a whole that is disturbed or not, and the fastest one says most about the cell.
    """
    fastest: dict[tuple[tuple[int, int], int], Row] = {}
    for row in rows:
        key = (row.cell, row.batch_size)
        if key not in fastest or row.tokens_per_s > fastest[key].tokens_per_s:
            fastest[key] = row
    return fastest


def num_equal_outputs(row: Row, plain: Row) -> tuple[int, int]:
    """How many prompts' outputs equal plain decoding's, and of how many."""
    pairs = list(zip(row.outputs.split(), plain.outputs.split(), strict=True))
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)
