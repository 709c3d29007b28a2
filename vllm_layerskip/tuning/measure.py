# SPDX-License-Identifier: Apache-2.0
"""Measure cells in real engines: ``CellJob`` in, measurements out.

``measure_cells`` depends on its job alone. On one machine ``process_jobs`` has a process of
``worker.py`` call it, on a cluster ``ray_jobs`` a task.

Only steady decoding is timed (``timing.py``), since costs and predictions speak of nothing else.
Prompts run in groups of the batch size; a group is timed from the step in which all of its requests
decode to the first request's end. Prompts come from the prefix cache, which one pass fills.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.host.engine_start import Given, start_engine
from vllm_layerskip.measuring.timing import Window, run_steps, steady_window
from vllm_layerskip.tuning.cells import Measurement, output_digest
from vllm_layerskip.tuning.grid import PLAIN_DECODING, DraftCell
from vllm_layerskip.tuning.jobs import CellJob, EngineSettings, Workload
from vllm_layerskip.twins.kinds import NONE

if TYPE_CHECKING:
    from vllm import LLM

Prompt = tuple[int, ...]
"""Token ids."""


@dataclass(frozen=True)
class Run:
    """Steady decoding of all prompts once: a window for each group."""

    windows: tuple[Window, ...]

    @property
    def num_tokens(self) -> int:
        return sum(window.num_tokens for window in self.windows)

    @property
    def num_steps(self) -> int:
        return sum(window.num_steps for window in self.windows)

    @property
    def seconds(self) -> float:
        return sum(window.seconds for window in self.windows)


def engine_arguments(engine: EngineSettings, cell: DraftCell, max_num_seqs: int) -> dict[str, Any]:
    """Arguments of ``LLM`` for a cell."""
    arguments: dict[str, Any] = {
        "model": engine.model,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": engine.enforce_eager,
        "disable_log_stats": False,
        "seed": 0,
        "speculative_config": _speculative_config(engine, cell),
    }
    if engine.kv_cache_memory_bytes is not None:
        arguments["kv_cache_memory_bytes"] = engine.kv_cache_memory_bytes
    return arguments | dict(engine.engine_args)


def given_arguments(engine: EngineSettings, cell: DraftCell, max_num_seqs: int) -> Given:
    """Arguments of ``LLM`` for a cell, with the options that they came from."""
    options = {"dtype": f"--dtype {engine.dtype}"}
    if engine.draft_vocab is not None:
        options["draft_vocab"] = f"--draft-vocab {engine.draft_vocab}"
    if cell.draft.quantization != NONE:
        options["draft_quantization"] = f"--draft-quantization {cell.draft.quantization}"
    if cell.draft.adapter != NONE:
        options["draft_adapter"] = f"--draft-adapter {engine.draft_adapters[cell.draft.adapter]}"
    return Given(engine_arguments(engine, cell, max_num_seqs), options, engine.engine_args)


def _speculative_config(engine: EngineSettings, cell: DraftCell) -> dict[str, Any] | None:
    """All is stated, so that neither the checkpoint's pair nor its schedule or twin is used."""
    if cell == PLAIN_DECODING:
        return None
    draft, (exit_layer, num_drafts) = cell
    config: dict[str, Any] = {
        "method": "layerskip",
        "exit_layer": exit_layer,
        "num_speculative_tokens": num_drafts,
        "draft_quantization": draft.quantization,
        "draft_adapter": engine.draft_adapters.get(draft.adapter, NONE),
    }
    if engine.draft_vocab is not None:
        config["draft_vocab"] = engine.draft_vocab
    return config


def measure_cells(job: CellJob) -> Iterator[Measurement]:
    """Start each cell's engine in this process and measure every batch size.

    Raises:
        UserError: an engine cannot start with these settings, or answers are too short.
    """
    for cell in job.cells:
        start = time.perf_counter()
        llm = start_engine(given_arguments(job.engine, cell, max(job.workload.batch_sizes)))
        start_s = time.perf_counter() - start
        run_steps(llm, job.workload.prompts, max_tokens=1)  # Fills the prefix cache.
        for batch_size in job.workload.batch_sizes:
            yield measure_batch_size(llm, cell, batch_size, job, start_s)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def measure_batch_size(
    llm: LLM, cell: DraftCell, batch_size: int, job: CellJob, start_s: float
) -> Measurement:
    """Warm up, then decode all prompts ``repeats`` times, ``batch_size`` at once.

    Args:
        start_s: what the engine took to start.

    Raises:
        UserError: every answer is too short for a step in which all requests decode.
    """
    workload, (draft, (exit_layer, num_drafts)) = job.workload, cell
    groups = batch_groups(workload.prompts, batch_size)
    warm_up = min(workload.max_tokens, 4 * (num_drafts + 1))
    run_steps(llm, groups[0], warm_up, workload.stop_token_ids)
    before = _counts(llm, cell)
    outputs: list[list[int]] = []
    runs = [
        _run(llm, groups, workload, outputs if number == 0 else None)
        for number in range(workload.repeats)
    ]
    num_seen, num_accepted = (b - a for a, b in zip(before, _counts(llm, cell), strict=True))
    speeds = [run.num_tokens / run.seconds for run in runs]
    first = runs[0]
    return Measurement(
        settings_digest=job.settings_digest,
        exit_layer=exit_layer,
        num_speculative_tokens=num_drafts,
        batch_size=batch_size,
        tokens_per_s=round(statistics.median(speeds), 3),
        step_ms=round(1e3 * statistics.median(run.seconds / run.num_steps for run in runs), 4),
        acceptance_length=round(first.num_tokens / (first.num_steps * batch_size), 4),
        num_drafts=num_seen,
        num_accepted_tokens=num_accepted,
        num_steps=first.num_steps,
        runs_tokens_per_s=" ".join(f"{speed:.2f}" for speed in speeds),
        outputs=" ".join(output_digest(ids) for ids in outputs[: len(workload.prompts)]),
        start_s=round(start_s, 2),
        draft_quantization=draft.quantization,
        draft_adapter=draft.adapter,
    )


def batch_groups(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """All prompts in groups of ``batch_size``; the last one is filled up from the beginning."""
    num_groups = -(-len(prompts) // batch_size)
    filled = [prompts[i % len(prompts)] for i in range(num_groups * batch_size)]
    return [filled[i : i + batch_size] for i in range(0, len(filled), batch_size)]


def _run(
    llm: LLM,
    groups: Sequence[Sequence[Prompt]],
    workload: Workload,
    outputs: list[list[int]] | None,
) -> Run:
    windows = []
    for group in groups:
        steps = run_steps(llm, group, workload.max_tokens, workload.stop_token_ids, outputs)
        try:
            windows.append(steady_window(steps, len(group)))
        except ValueError:
            continue  # An answer so short that no step is left.
    if not windows:
        raise UserError(
            f"no answer of batch size {len(groups[0])} is long enough to be timed. Raise "
            "--max-tokens, lower --batch-sizes, or give prompts with longer answers."
        )
    return Run(tuple(windows))


def _counts(llm: LLM, cell: DraftCell) -> tuple[int, int]:
    """Drafts so far, and how many draft tokens were accepted."""
    if cell == PLAIN_DECODING:
        return 0, 0
    from vllm_layerskip.metrics.counters import read_counters

    counters = read_counters(llm)
    return counters.num_drafts, counters.num_accepted_tokens


def generate(engine: EngineSettings, workload: Workload) -> list[list[int]]:
    """Plain vLLM's greedy answers to all prompts."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    llm = start_engine(given_arguments(engine, PLAIN_DECODING, max(workload.batch_sizes)))
    params = SamplingParams(
        temperature=0,
        max_tokens=workload.max_tokens,
        ignore_eos=True,
        stop_token_ids=list(workload.stop_token_ids),
        detokenize=False,
    )
    inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in workload.prompts]
    answers = llm.generate(inputs, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()  # Another model is going to need its memory.
    return [list(answer.outputs[0].token_ids) for answer in answers]
