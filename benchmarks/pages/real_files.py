# SPDX-License-Identifier: Apache-2.0
"""Result files of a real model, whose names say what they hold: WORKLOAD-DTYPE[-bN][-tT].json.

WORKLOAD is spec-bench, functions or word-problems, N the batch size where it matters (for speed),
and T the temperature if answers are sampled: ``spec-bench-float32.json``,
``functions-bfloat16-b1.json``, ``word-problems-bfloat16-b1-t0.7.json``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.prompts.records import load
from benchmarks.prompts.summary import batch_size
from vllm_layerskip.errors import UserError

WORKLOADS = {
    "spec-bench": "Spec-Bench",
    "functions": "Functions",
    "word-problems": "Word problems",
}
"""With their headings, in the order of the page."""
DTYPES = ("float32", "bfloat16", "float16")

_NAME = re.compile(
    rf"(?P<workload>{'|'.join(WORKLOADS)})-(?P<dtype>{'|'.join(DTYPES)})"
    r"(-b(?P<batch>[1-9]\d*))?(-t(?P<temperature>\d+(\.\d+)?))?"
)


@dataclass(frozen=True)
class RealFile:
    """A file and what its name says."""

    path: Path
    workload: str
    dtype: str
    batch_size: int | None
    temperature: float
    records: list[dict[str, Any]]

    @property
    def table(self) -> str:
        """The name of its table on the page."""
        return f"real-{self.path.stem.replace('.', '_')}"

    @property
    def heading(self) -> str:
        parts = [WORKLOADS[self.workload], self.dtype]
        if self.batch_size is not None:
            parts.append("one at a time" if self.batch_size == 1 else f"{self.batch_size} at once")
        if self.temperature:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join(parts)

    @property
    def model(self) -> str:
        return Path(self.records[0]["settings"]["model"]).name


def read_real_files(folder: Path) -> list[RealFile]:
    """The files of a folder in the order of the page; none if there is no such folder.

    Raises:
        UserError: a name says something else than the file has, or the files have several models.
    """
    files = [_read(path) for path in folder.glob("*.json")]
    models = sorted({file.model for file in files})
    if len(models) > 1:
        raise UserError(f"{folder}: its files have the models {', '.join(models)}. Keep one's.")
    order = list(WORKLOADS)
    return sorted(
        files,
        key=lambda file: (
            file.temperature,
            order.index(file.workload),
            DTYPES.index(file.dtype),
            file.batch_size or 0,
        ),
    )


def _read(path: Path) -> RealFile:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        raise UserError(
            f"{path}: the name must be WORKLOAD-DTYPE[-bN][-tT].json with a workload of "
            f"{', '.join(WORKLOADS)} and a dtype of {', '.join(DTYPES)}. Rename it."
        )
    batch = None if match["batch"] is None else int(match["batch"])
    temperature = float(match["temperature"] or 0)
    records = load(path)
    for record in records:
        has = (
            record["settings"]["dtype"],
            batch if batch is None else batch_size(record),
            record["sampling"]["temperature"],
        )
        if has != (match["dtype"], batch, temperature):
            raise UserError(
                f"{path}: a record has dtype {has[0]}, batch size {batch_size(record)} and "
                f"temperature {has[2]:g}, not what the name says. Rename it."
            )
    return RealFile(path, match["workload"], match["dtype"], batch, temperature, records)
