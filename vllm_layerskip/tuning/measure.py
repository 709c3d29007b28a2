# SPDX-License-Identifier: Apache-2.0
"""Measure cells in real engines: ``CellJob`` in, rows out.

``measure_cells`` is a function of its job alone. Locally ``processes`` call it through
``worker.py``; it can as well be a task on another machine.

Only steady decoding is timed (``timing.py``): prompts run in groups of the batch size, each from
the step in which all of its requests decode to the first request's end, so what is timed is what
the costs and predictions speak of. Prompts come from the prefix cache, which one pass fills.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_layerskip.measuring.timing import Window, run_steps, steady_window
from vllm_layerskip.tuning.cells import PLAIN, Row, output_digest

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class EngineSettings:
    """How the engines run; vLLM's defaults but for this."""

    model: str
    dtype: str = "auto"
    device: str = "cuda"
    max_model_len: int = 2048
    enforce_eager: bool = False
    draft_vocab: str | None = None
    """``draft_vocab`` of the request; None leaves it to the checkpoint."""
    kv_cache_memory_bytes: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``LLM``; they go before the others."""


@dataclass(frozen=True)
class Load:
    """What the engines generate."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    repeats: int


@dataclass(frozen=True)
class CellJob:
    """Cells (E, K) to measure one after another, an engine for each."""

    cells: tuple[tuple[int, int], ...]
    engine: EngineSettings
    load: Load
    settings: str
    """Digest that the rows carry."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellJob:
        load = values["load"]
        return cls(
            cells=tuple((exit_layer, drafts) for exit_layer, drafts in values["cells"]),
            engine=EngineSettings(**values["engine"]),
            load=Load(
                **{
                    **load,
                    "prompts": tuple(map(tuple, load["prompts"])),
                    "stop_token_ids": tuple(load["stop_token_ids"]),
                    "batch_sizes": tuple(load["batch_sizes"]),
                }
            ),
            settings=values["settings"],
        )


def engine_arguments(
    engine: EngineSettings, cell: tuple[int, int], max_num_seqs: int
) -> dict[str, Any]:
    """Arguments of ``LLM`` for a cell."""
    speculative_config = None
    if cell != PLAIN:
        # Stated, so that neither the checkpoint's pair nor its schedule comes in.
        speculative_config = {
            "method": "layerskip",
            "exit_layer": cell[0],
            "num_speculative_tokens": cell[1],
        }
        if engine.draft_vocab is not None:
            speculative_config["draft_vocab"] = engine.draft_vocab
    arguments: dict[str, Any] = {
        "model": engine.model,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": engine.enforce_eager,
        "disable_log_stats": False,
        "seed": 0,
        "speculative_config": speculative_config,
    }
    if engine.kv_cache_memory_bytes is not None:
        arguments["kv_cache_memory_bytes"] = engine.kv_cache_memory_bytes
    return arguments | dict(engine.engine_args)


def measure_cells(job: CellJob) -> Iterator[Row]:
    """Start each cell's engine in this process and measure every batch size."""
    from vllm import LLM

    for cell in job.cells:
        start = time.perf_counter()
        llm = LLM(**engine_arguments(job.engine, cell, max(job.load.batch_sizes)))
        start_s = time.perf_counter() - start
        run_steps(llm, job.load.prompts, max_tokens=1)  # Fills the prefix cache.
        for batch_size in job.load.batch_sizes:
            yield measure_batch_size(llm, cell, batch_size, job, start_s)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def measure_batch_size(
    llm: LLM, cell: tuple[int, int], batch_size: int, job: CellJob, start_s: float
) -> Row:
    """Warm up, then decode all prompts ``repeats`` times, ``batch_size`` at once.

    Raises:
        ValueError: every answer is too short for a step in which all requests decode.
    """
    load, (_, num_drafts) = job.load, cell
    groups = batch_groups(load.prompts, batch_size)
    warm_up = min(load.max_tokens, 4 * (num_drafts + 1))
    run_steps(llm, groups[0], warm_up, load.stop_token_ids)
    before = _counts(llm, cell)
    outputs: list[list[int]] = []
    runs = [_run(llm, groups, load, outputs if run == 0 else None) for run in range(load.repeats)]
    num_seen, num_accepted = (b - a for a, b in zip(before, _counts(llm, cell), strict=True))
    speeds = [sum(w.num_tokens for w in run) / sum(w.seconds for w in run) for run in runs]
    steps = [sum(w.seconds for w in run) / sum(w.num_steps for w in run) for run in runs]
    num_steps = sum(w.num_steps for w in runs[0])
    return Row(
        settings=job.settings,
        exit_layer=cell[0],
        num_speculative_tokens=num_drafts,
        batch_size=batch_size,
        tokens_per_s=round(statistics.median(speeds), 3),
        step_ms=round(1e3 * statistics.median(steps), 4),
        acceptance_length=round(
            sum(w.num_tokens for w in runs[0]) / (num_steps * batch_size), 4
        ),
        num_drafts=num_seen,
        num_accepted_tokens=num_accepted,
        num_steps=num_steps,
        runs_tokens_per_s=" ".join(f"{speed:.2f}" for speed in speeds),
        outputs=" ".join(output_digest(ids) for ids in outputs[: len(load.prompts)]),
        start_s=round(start_s, 2),
    )  # fmt: skip


def batch_groups(
    prompts: Sequence[tuple[int, ...]], batch_size: int
) -> list[list[tuple[int, ...]]]:
    """All prompts in groups of ``batch_size``; the last one is filled up from the beginning."""
    num_groups = -(-len(prompts) // batch_size)
    filled = [prompts[i % len(prompts)] for i in range(num_groups * batch_size)]
    return [filled[i : i + batch_size] for i in range(0, len(filled), batch_size)]


def _run(
    llm: LLM,
    groups: Sequence[Sequence[tuple[int, ...]]],
    load: Load,
    outputs: list[list[int]] | None,
) -> list[Window]:
    windows = []
    for group in groups:
        steps = run_steps(llm, group, load.max_tokens, load.stop_token_ids, outputs)
        try:
            windows.append(steady_window(steps, len(group)))
        except ValueError:
            continue  # An answer so short that no step is left.
    if not windows:
        raise ValueError(
            f"No answer of batch size {len(groups[0])} is long enough to be timed. Raise "
            "--max-tokens, lower --batch-sizes, or give prompts with longer answers."
        )
    return windows


def _counts(llm: LLM, cell: tuple[int, int]) -> tuple[int, int]:
    if cell == PLAIN:
        return 0, 0
    from vllm_layerskip.metrics.counters import read_counters

    counters = read_counters(llm)
    return counters.num_drafts, counters.num_accepted_tokens


def generate(engine: EngineSettings, load: Load) -> list[list[int]]:
    """Plain vLLM's greedy continuations of all prompts."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(**engine_arguments(engine, PLAIN, max(load.batch_sizes)))
    params = SamplingParams(
        temperature=0,
        max_tokens=load.max_tokens,
        ignore_eos=True,
        stop_token_ids=list(load.stop_token_ids),
        detokenize=False,
    )
    inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in load.prompts]
    answers = llm.generate(inputs, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()  # Another model is going to need its memory.
    return [list(answer.outputs[0].token_ids) for answer in answers]
