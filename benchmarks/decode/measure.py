# SPDX-License-Identifier: Apache-2.0
"""Measure one mode in one process: one engine, every prompt length and batch size.

    python -m benchmarks.decode.measure --mode layerskip --preset 7b-cnndm --batch-sizes 1 32

Each cell (prompt length, batch size) goes to ``--output`` when it is done. Only steady decoding
is timed (``vllm_layerskip/measuring/timing.py``): one pass fills the prefix cache with the prompts
beforehand. ``benchmarks.decode.compare`` runs the modes of a table; with ``--turns`` it says which
cell is measured when (``turns.py``).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.decode.measure_transformers import measure_transformers
from benchmarks.decode.processes import MODES_WITHOUT_DRAFTS
from benchmarks.decode.prompts import make_prompts
from benchmarks.decode.runs import Clock, Emit, summarise
from benchmarks.decode.turns import take_turns
from benchmarks.engines.arguments import (
    FRESH_CACHE_VARIABLE,
    engine_arguments,
    prepare_environment,
)
from benchmarks.engines.command_line import make_parser, mistakes_reported, positive_int
from benchmarks.engines.facts import (
    kv_capacity_tokens,
    speculation_between,
    speculation_counts,
    worker_memory,
)
from benchmarks.engines.modes import MODES, TRANSFORMERS_MODES
from benchmarks.engines.results import add_record, finished_cells, load_records
from benchmarks.engines.settings import DecodeCell, Settings, add_arguments, settings_from
from vllm_layerskip.measuring.provenance import provenance
from vllm_layerskip.measuring.timing import run_steps, steady_window

if TYPE_CHECKING:
    from vllm import LLM


def measure_cell(
    llm: LLM, settings: Settings, mode: str, prompts: list[list[int]]
) -> dict[str, Any]:
    """Decode all prompts ``repeats`` times."""
    before = speculation_counts(llm, mode)
    windows = [
        steady_window(run_steps(llm, prompts, settings.output_len), len(prompts))
        for _ in range(settings.repeats)
    ]
    counts = speculation_between(before, speculation_counts(llm, mode))
    return summarise(windows) | {"speculation": counts}


def warm_up(llm: LLM, settings: Settings, mode: str, prompts: list[list[int]]) -> None:
    """A few steps of what is measured next."""
    num_drafts = 0 if mode in MODES_WITHOUT_DRAFTS else settings.num_speculative_tokens
    run_steps(llm, prompts, min(settings.output_len, 8 + 4 * (num_drafts + 1)))


def num_needed_tokens(settings: Settings, cell: DecodeCell) -> int:
    """KV cache slots of a cell: prompts, answers, and the last step's drafts."""
    answer_len = settings.output_len + settings.num_speculative_tokens + 1
    return cell.batch_size * (cell.prompt_len + answer_len)


def measure_engine(
    settings: Settings, mode: str, cells: Iterable[DecodeCell], clock: Clock, emit: Emit
) -> None:
    """Start the mode's engine and measure the cells."""
    import_start = time.perf_counter()
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        arguments = engine_arguments(settings, mode, Path(folder), fixed_batches=True)
        start = time.perf_counter()
        llm = LLM(**arguments)
        engine: dict[str, Any] = {
            "fresh_cache": FRESH_CACHE_VARIABLE in os.environ,
            "import_s": round(start - import_start, 2),
            "start_s": round(time.perf_counter() - start, 2),
            "kv_capacity_tokens": kv_capacity_tokens(llm),
            "memory": llm.collective_rpc(worker_memory)[0],
            "arguments": {k: value for k, value in arguments.items() if k != "model"},
            "prefill_s": {},
        }
        _measure_cells(llm, engine, settings, mode, cells, clock, emit)


def _measure_cells(
    llm: LLM,
    engine: dict[str, Any],
    settings: Settings,
    mode: str,
    cells: Iterable[DecodeCell],
    clock: Clock,
    emit: Emit,
) -> None:
    """Emit a record for each cell; ``engine`` is in each, and gets the times of the prefills."""
    room = engine["kv_capacity_tokens"]
    prompts: list[list[int]] = []
    warm: set[DecodeCell] = set()
    for cell in cells:
        common = cell._asdict() | {"engine": engine}
        need = num_needed_tokens(settings, cell)
        if need > room:
            emit(common | {"status": "no-room", "reason": f"{need} KV slots of {room}"})
            continue
        if not clock.has_time():
            emit(common | {"status": "no-time", "reason": f"limit of {clock.limit_s} s"})
            continue
        begin = time.perf_counter()
        if not prompts or len(prompts[0]) != cell.prompt_len:
            prompts, seconds = _fill_prefix_cache(llm, settings, cell.prompt_len, room)
            engine["prefill_s"][str(cell.prompt_len)] = seconds
        batch = prompts[: cell.batch_size]
        if cell not in warm:
            warm_up(llm, settings, mode, batch)
            warm.add(cell)
        measured = measure_cell(llm, settings, mode, batch)
        emit(common | {"status": "ok"} | measured)
        clock.observe(time.perf_counter() - begin)


def _fill_prefix_cache(
    llm: LLM, settings: Settings, prompt_len: int, room: int
) -> tuple[list[list[int]], float]:
    """Prompts of the largest batch that fits, with K/V in the cache, and the seconds it took."""
    fitting = [
        batch_size
        for batch_size in settings.batch_sizes
        if num_needed_tokens(settings, DecodeCell(prompt_len, batch_size)) <= room
    ]
    config = llm.llm_engine.vllm_config.model_config
    prompts = make_prompts(
        settings.prompts, max(fitting), prompt_len, config.get_vocab_size(), Path(config.model)
    )
    start = time.perf_counter()
    run_steps(llm, prompts, max_tokens=1)
    return prompts, round(time.perf_counter() - start, 3)


@dataclass
class Job:
    """What one process measures, and where its records go.

    Args:
        settings: of the records to come; ``settings.round`` changes from turn to turn.
        facts: what all records have besides.
    """

    mode: str
    settings: Settings
    output: Path
    facts: dict[str, Any]

    def missing_cells(self) -> list[DecodeCell]:
        """Those that the file lacks.

        Raises:
            UserError: it is another kind of file.
        """
        records = load_records(self.output)
        finished = finished_cells(records, self.mode, self.settings.identity())
        return [cell for cell in self.settings.cells() if cell not in finished]

    def cells_of_turns(self, table: Connection) -> Iterator[DecodeCell]:
        """The cells that the table asks for, each in its round."""
        for turn in take_turns(table):
            self.settings = replace(self.settings, round=turn.round)
            yield turn.cell

    def emit(self, record: dict[str, Any]) -> None:
        common = {"kind": "decode", "mode": self.mode, "settings": self.settings.identity()}
        add_record(self.output, common | self.facts | record)


def record_facts(settings: Settings) -> dict[str, Any]:
    """What every record of these settings holds.

    Raises:
        UserError: an option does not fit the model.
    """
    return {
        "model_shape": asdict(settings.model_shape()),
        "num_draft_vocab_ids": settings.num_draft_vocab_ids,
        "provenance": provenance(),
    }


def measure_missing(job: Job, time_limit: float | None) -> None:
    """Measure the cells that the file lacks.

    Raises:
        UserError: it is another kind of file, or an option does not fit the model.
    """
    clock, cells = Clock(time_limit), job.missing_cells()
    if not cells:
        print(f"Nothing left to measure: {job.output} has every cell of {job.mode}.")
    elif job.mode in TRANSFORMERS_MODES:
        measure_transformers(job.settings, job.mode, cells, clock, job.emit)
    else:
        measure_engine(job.settings, job.mode, cells, clock, job.emit)


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--round", type=positive_int, help="Which of a table's rounds this is.")
    parser.add_argument("--time-limit", type=float, help="Seconds; no cell is begun beyond.")
    parser.add_argument("--note", help="A sentence on the setting, kept with every cell.")
    parser.add_argument("--turns", type=int, help=argparse.SUPPRESS)  # A pipe to a table.
    parser.add_argument("--output", type=Path, required=True, help="Result file; it is added to.")
    args = parser.parse_args()
    with mistakes_reported(parser):
        settings = settings_from(args)
        prepare_environment(settings.device)
        facts = record_facts(settings) | ({"note": args.note} if args.note else {})
        facts |= {} if args.turns is None else {"interleaved": True}
        job = Job(args.mode, settings, args.output, facts)
        if args.turns is None:
            measure_missing(job, args.time_limit)
            return
        with Connection(args.turns) as table:
            cells = job.cells_of_turns(table)
            measure_engine(settings, args.mode, cells, Clock(None), job.emit)


if __name__ == "__main__":
    main()
