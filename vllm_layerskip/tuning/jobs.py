# SPDX-License-Identifier: Apache-2.0
"""Run jobs of ``worker.py``: a fresh process for each, its log beside the results."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.measuring.processes import logged_process
from vllm_layerskip.tuning.cells import Row
from vllm_layerskip.tuning.measure import CellJob

_LOG_LINES = 12


def worker_environment(device: str) -> dict[str, str]:
    """Variables that must stand before vLLM is imported."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        # The engine in the same process: nothing but its work is timed.
        defaults |= {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def run_job(job: Mapping[str, Any], device: str, log: Path) -> Iterator[dict[str, Any]]:
    """Results of a job, each as soon as its process has written it.

    Raises:
        UserError: the process failed; the message ends with its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_path, output_path = Path(folder, "job.json"), Path(folder, "results.jsonl")
        job_path.write_text(json.dumps(job), encoding="utf-8")
        output_path.touch()
        command = [sys.executable, "-m", "vllm_layerskip.tuning.worker"]
        command += [str(job_path), str(output_path)]
        with (
            logged_process(command, log, worker_environment(device)) as process,
            output_path.open(encoding="utf-8") as output,
        ):
            while True:
                ended = _has_ended(process)
                yield from _whole_lines(output)
                if ended:
                    break
        if process.returncode != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            raise UserError(
                f"a process that loads the model failed (status {process.returncode}); its log is "
                f"{log} and ends with\n" + "\n".join(lines)
            )


def _has_ended(process: Any, patience_s: float = 0.5) -> bool:
    import subprocess

    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _whole_lines(output: Any) -> Iterator[dict[str, Any]]:
    while True:
        start = output.tell()
        line = output.readline()
        if not line.endswith("\n"):
            output.seek(start)
            return
        yield json.loads(line)


def measure_in_processes(job: CellJob, cells_per_process: int, logs: Path) -> Iterator[Row]:
    """Measure a job's cells, ``cells_per_process`` in each process, one process at a time."""
    for start in range(0, len(job.cells), cells_per_process):
        part = replace(job, cells=job.cells[start : start + cells_per_process])
        name = "-".join(f"e{exit_layer}k{drafts}" for exit_layer, drafts in part.cells[:4])
        request = {"kind": "cells", "job": part.to_dict()}
        for values in run_job(request, job.engine.device, logs / f"{name}.log"):
            yield Row(**values)


def agreement_in_process(
    job: CellJob,
    exit_layers: Sequence[int],
    draft_vocab: Sequence[int] | None,
    generator: str,
    path: Path,
    logs: Path,
) -> Agreement:
    """Agreement statistics of the job's prompts, kept in ``path``.

    Args:
        generator: ``vllm`` or ``transformers``; what writes the greedy continuations.
    """
    request = agreement_request(job, exit_layers, draft_vocab, generator, path)
    for _ in run_job(request, job.engine.device, logs / "agreement.log"):
        pass
    return Agreement.load(path)[0]


def agreement_request(
    job: CellJob,
    exit_layers: Sequence[int],
    draft_vocab: Sequence[int] | None,
    generator: str,
    path: Path,
) -> dict[str, Any]:
    """The job of ``worker.py`` that writes agreement statistics to ``path``."""
    return {
        "kind": "agreement",
        "job": job.to_dict(),
        "exit_layers": list(exit_layers),
        "draft_vocab": None if draft_vocab is None else list(draft_vocab),
        "generator": generator,
        "path": str(path),
    }
