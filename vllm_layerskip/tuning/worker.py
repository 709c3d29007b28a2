# SPDX-License-Identifier: Apache-2.0
"""A process of its own for whatever loads a model: ``python -m ....worker REQUEST OUTPUT``.

The request is a JSON file; the output has a JSON line for each result, as soon as it is there:

=========  ================================================================================
cells      the request's ``job`` is a ``CellJob``; each line is a measurement
agreement  it is an ``AgreementJob``; the statistics go to the request's ``path``, and the one
           line says how many tokens they are of
=========  ================================================================================

A mistake of the user is the last line, ``{"user_error": MESSAGE}``.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from vllm_layerskip.errors import UserError
from vllm_layerskip.host.engine_start import check_engine
from vllm_layerskip.tuning.jobs import USER_ERROR, AgreementJob, CellJob, EngineSettings
from vllm_layerskip.tuning.measure import generate, given_arguments, measure_cells


def results(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Do what a request asks for."""
    if request["kind"] == "cells":
        for measurement in measure_cells(CellJob.from_dict(request["job"])):
            yield measurement.to_dict()
    else:
        yield _agreement(AgreementJob.from_dict(request["job"]), Path(request["path"]))


def _agreement(job: AgreementJob, path: Path) -> dict[str, Any]:
    workload, engine = job.workload, job.engine
    answers = None
    if job.generator == "vllm":
        # Drafting must be possible, too, before minutes go into plain answers.
        cell = (job.exit_layers[0], 1)
        check_engine(given_arguments(engine, cell, max(workload.batch_sizes)))
        answers = generate(engine, workload)
    gc.collect()
    import torch

    from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement

    device = torch.device(engine.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = _load_model(engine, device)
    prompts = workload.prompts
    if answers is None:
        answers = generate_greedily(model, prompts, workload.max_tokens, workload.stop_token_ids)
    agreement = measure_agreement(model, prompts, answers, job.exit_layers, job.draft_vocab)
    agreement.save(path, job.settings_digest)
    return {"num_tokens": agreement.num_tokens}


def _load_model(engine: EngineSettings, device: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engine.model, dtype=engine.dtype).to(device).eval()


def main() -> None:
    request_path, output_path = map(Path, sys.argv[1:])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    with output_path.open("a", encoding="utf-8") as output:
        try:
            for result in results(request):
                _write_line(output, result)
        except UserError as error:
            _write_line(output, {USER_ERROR: str(error)})


def _write_line(output: TextIO, result: Mapping[str, Any]) -> None:
    output.write(json.dumps(result) + "\n")
    output.flush()


if __name__ == "__main__":
    main()
