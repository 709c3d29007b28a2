# SPDX-License-Identifier: Apache-2.0
"""Small jobs whose answers come from a function instead of an engine."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_layerskip.batch import job
from vllm_layerskip.batch.output import Answer
from vllm_layerskip.batch.parameters import merged

DEFAULTS = merged({}, None)


def write_rows(path: Path, *records) -> Path:
    """Write records as JSON lines; texts as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def answer_all(rows):
    """Answer in the opposite order, as engines may."""
    for row in reversed(list(rows)):
        yield Answer(row.index, f"<{row.prompt}>", (row.index, 7), "stop", 3)


def run_job(folder: Path, files, generate=answer_all, output="output.jsonl") -> job.Summary:
    folder.mkdir(exist_ok=True)
    return job.run(job.Job(files, DEFAULTS, folder / output, with_token_ids=True), generate)


def read_output(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "output.jsonl").read_text().splitlines()]
