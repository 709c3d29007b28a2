# SPDX-License-Identifier: Apache-2.0
"""The result file of ``benchmarks.prompts.real_prompts``: a record for each mode and (E, K)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.results import write_result
from benchmarks.engines.settings import Settings
from vllm_layerskip.errors import UserError

SCHEMA = 1


def load(path: Path) -> list[dict[str, Any]]:
    """Records of a result file.

    Raises:
        UserError: it is another kind of file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    known = isinstance(content, dict) and content.get("kind") == "real-prompts"
    if not known or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is no result file of real_prompts.")
    return content["records"]


def save(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the whole file, and its folder if there is none."""
    write_result(path, {"schema": SCHEMA, "kind": "real-prompts", "records": records})


def is_record_of(record: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    """Whether a record is what the job would measure."""
    settings = Settings(**job["settings"])
    ours = settings.identity() | {"batch_size": settings.batch_sizes[0]}
    return (
        record["mode"] == job["mode"]
        and record["settings"] == ours
        and record["sampling"] == job["sampling"]
        and record["questions"] == job["source"]
    )
