# SPDX-License-Identifier: Apache-2.0
"""Make the agreement statistics of an ``AgreementJob``, a file for each draft.

The target's greedy answers are made once. Then one pass along them tells every exit's predictions:
of the target's own layers, or of a twin of the whole model, which has the twins of all exits in it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement
from vllm_layerskip.evaluation.twin import make_twin
from vllm_layerskip.host.engine_start import check_engine
from vllm_layerskip.tuning.check_drafts import read_adapter
from vllm_layerskip.tuning.check_kernels import check_kernels
from vllm_layerskip.tuning.drafts import OWN, Draft, agreement_name
from vllm_layerskip.tuning.grid import DraftCell
from vllm_layerskip.tuning.jobs import AgreementJob, EngineSettings
from vllm_layerskip.tuning.measure import generate, given_arguments
from vllm_layerskip.tuning.twin_agreement import measure_twin_agreement
from vllm_layerskip.twins.kinds import NONE


def make_agreements(job: AgreementJob, folder: Path) -> Iterator[dict[str, Any]]:
    """Write each draft's statistics to ``folder`` and say of how many tokens they are.

    Raises:
        UserError: vLLM refuses a draft or the settings.
    """
    answers = _vllm_answers(job) if job.generator == "vllm" else None
    device = torch.device(job.engine.device)
    _free(device)
    model = _load_model(job.engine, device)
    prompts, workload = job.workload.prompts, job.workload
    if answers is None:
        answers = generate_greedily(model, prompts, workload.max_tokens, workload.stop_token_ids)
    own_exits = dict(job.exits).get(OWN, (1,))
    own = measure_agreement(model, prompts, answers, own_exits, job.draft_vocab)
    for draft, exit_layers in job.exits:
        agreement = own
        if draft.has_twin:
            del model
            _free(device)
            model = _load_twin(job.engine, draft, device)
            matches = measure_twin_agreement(model, prompts, answers, exit_layers, job.draft_vocab)
            agreement = Agreement(exit_layers, matches, own.target_agreement)
        agreement.save(folder / agreement_name(draft), job.settings_digest)
        yield {"num_tokens": agreement.num_tokens}


def _vllm_answers(job: AgreementJob) -> list[list[int]]:
    # Drafting must be possible, too, before minutes go into plain answers.
    for draft, exit_layers in job.exits:
        cell = DraftCell(draft, (exit_layers[0], 1))
        check_engine(given_arguments(job.engine, cell, max(job.workload.batch_sizes)))
    check_kernels(job.engine, [draft for draft, _ in job.exits])
    return generate(job.engine, job.workload)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _load_model(engine: EngineSettings, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engine.model, dtype=engine.dtype).to(device).eval()


def _load_twin(engine: EngineSettings, draft: Draft, device: torch.device) -> Any:
    model = _load_model(engine, device)
    adapter = None
    if draft.adapter != NONE:
        adapter = read_adapter(engine.draft_adapters[draft.adapter], engine.model)
    make_twin(model, draft.quantization, adapter)
    return model
