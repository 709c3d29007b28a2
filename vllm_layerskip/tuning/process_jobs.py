# SPDX-License-Identifier: Apache-2.0
"""Run jobs of ``worker.py``: a fresh process for each, its log beside the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.processes import logged_process, reason_of_failure
from vllm_layerskip.tuning.cells import Measurement
from vllm_layerskip.tuning.grid import DraftCell
from vllm_layerskip.tuning.jobs import USER_ERROR, AgreementJob, CellJob


def worker_environment(device: str) -> dict[str, str]:
    """Variables that must be set before vLLM is imported."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        # The engine in the same process: nothing but its work is timed.
        defaults |= {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def measure_in_processes(job: CellJob, cells_per_process: int, logs: Path) -> Iterator[Measurement]:
    """Measure a job's cells, ``cells_per_process`` in each process, one process at a time."""
    for part in job.parts(cells_per_process):
        name = "-".join(map(_log_name, part.cells[:4]))
        request = {"kind": "cells", "job": part.to_dict()}
        for values in run_job(request, job.engine.device, logs / f"{name}.log"):
            yield Measurement.from_dict(values)


def _log_name(cell: DraftCell) -> str:
    twin = f"{cell.draft.name}-" if cell.draft.has_twin else ""
    return "{}e{}k{}".format(twin, *cell.cell)


def agreements_in_process(job: AgreementJob, folder: Path, logs: Path) -> None:
    """Make a job's agreement statistics in ``folder``."""
    request = {"kind": "agreement", "job": job.to_dict(), "folder": str(folder)}
    for _ in run_job(request, job.engine.device, logs / "agreement.log"):
        pass


def run_job(request: Mapping[str, Any], device: str, log: Path) -> Iterator[dict[str, Any]]:
    """Results of a request to ``worker.py``, each as soon as its process has written it.

    Raises:
        UserError: the process failed; the message names its log and has the error in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        request_path, output_path = Path(folder, "request.json"), Path(folder, "results.jsonl")
        request_path.write_text(json.dumps(request), encoding="utf-8")
        output_path.touch()
        command = [sys.executable, "-m", "vllm_layerskip.tuning.worker"]
        command += [str(request_path), str(output_path)]
        with (
            logged_process(command, log, worker_environment(device)) as process,
            output_path.open(encoding="utf-8") as output,
        ):
            for result in _results(process, output):
                if USER_ERROR in result:
                    raise UserError(result[USER_ERROR])
                yield result
        if process.returncode != 0:
            raise UserError(
                f"a process that loads the model failed with {reason_of_failure(process, log)}. "
                f"Its log: {log}"
            )


def _results(process: subprocess.Popen[bytes], output: IO[str]) -> Iterator[dict[str, Any]]:
    """Lines as they come; the last ones after the process has ended."""
    has_ended = False
    while not has_ended:
        has_ended = _has_ended(process)
        yield from _whole_lines(output)


def _has_ended(process: subprocess.Popen[bytes], patience_s: float = 0.5) -> bool:
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _whole_lines(output: IO[str]) -> Iterator[dict[str, Any]]:
    while True:
        start = output.tell()
        line = output.readline()
        if not line.endswith("\n"):
            output.seek(start)
            return
        yield json.loads(line)
