# SPDX-License-Identifier: Apache-2.0
"""A process of its own for whatever loads a model: ``python -m ....worker JOB OUTPUT``.

The job is a JSON file; the output has a JSON line for each result, as soon as it is there:

=========  ================================================================================
cells      ``CellJob``; each line is a row
agreement  the statistics go to the ``path`` that the job names; the one line says so. The
           continuations come from vLLM or from transformers, as the job's ``generator`` says
=========  ================================================================================
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_layerskip.tuning.measure import CellJob, EngineSettings, generate, measure_cells


def results(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Do a job."""
    if job["kind"] == "cells":
        yield from (asdict(row) for row in measure_cells(CellJob.from_dict(job["job"])))
    else:
        yield _agreement(job)


def _agreement(job: Mapping[str, Any]) -> dict[str, Any]:
    cells = CellJob.from_dict(job["job"])
    load, engine = cells.load, cells.engine
    continuations = generate(engine, load) if job["generator"] == "vllm" else None
    gc.collect()
    import torch

    from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement

    device = torch.device(engine.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = _load_model(engine, device)
    if continuations is None:
        continuations = generate_greedily(model, load.prompts, load.max_tokens, load.stop_token_ids)
    agreement = measure_agreement(
        model, load.prompts, continuations, job["exit_layers"], job["draft_vocab"]
    )
    agreement.save(Path(job["path"]), cells.settings)
    return {"num_tokens": agreement.num_tokens}


def _load_model(engine: EngineSettings, device: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engine.model, dtype=engine.dtype).to(device).eval()


def main() -> None:
    job_path, output_path = map(Path, sys.argv[1:])
    job = json.loads(job_path.read_text(encoding="utf-8"))
    with output_path.open("a", encoding="utf-8") as output:
        for result in results(job):
            output.write(json.dumps(result) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
