# SPDX-License-Identifier: Apache-2.0
"""Measure the modes of one table, each in a process of its own, and print it.

    python -m benchmarks.decode.compare --preset 7b-cnndm --batch-sizes 1 4 16 32 \\
        --output benchmarks/results/7b-cnndm.json

    python -m benchmarks.decode.compare --device cpu --tiny        # the same path, as a rehearsal

Every cell is in the file as soon as it is measured. ``--resume`` goes on with a file; what it has
is not measured again. A mode that fails leaves its error in the file and the others run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.decode.summary import baseline_settings, describe, rich_table, rows
from benchmarks.engines.arguments import empty_caches
from benchmarks.engines.modes import MODES, TRANSFORMERS_MODES
from benchmarks.engines.results import OUT_OF_TIME, Record, add_record, load_records
from benchmarks.engines.settings import Settings, add_arguments, settings_from
from vllm_layerskip.measuring.processes import log_tail, logged_process
from vllm_layerskip.measuring.provenance import COMMAND_VARIABLE, command_line, provenance

DEFAULT_MODES = ("plain", "layerskip", "layerskip-no-reuse", "draft-model")
MEASURE = ("-m", "benchmarks.decode.measure")
STOP_MARGIN_S = 15.0
"""A mode stops on its own this long before it would be killed."""
PATIENCE_S = 4.0
"""How long a mode that is killed may clean up."""


@dataclass(frozen=True)
class Run:
    """One process: a mode, and the settings with its K."""

    mode: str
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.mode}-k{self.settings.num_speculative_tokens}"


def plan(modes: list[str], settings: Settings, num_drafts: list[int]) -> list[Run]:
    """The runs of a table: modes without drafts once, the others once for each K."""
    runs = []
    for mode in modes:
        drafts = mode not in ("plain", "early-exit", "transformers")
        for k in num_drafts if drafts else num_drafts[:1]:
            runs.append(Run(mode, settings.with_num_speculative_tokens(k)))
    return runs


def run_mode(
    run: Run,
    output: Path,
    log: Path,
    deadline: float | None = None,
    fresh_cache: bool = False,
    note: str | None = None,
) -> None:
    """Run a mode's process to its end; whatever comes of it is in ``output``.

    Args:
        deadline: on ``time.monotonic``.
        fresh_cache: start with empty compile caches, so that starts compare.
        note: a sentence on the setting, for its records.
    """
    time_left = None if deadline is None else deadline - time.monotonic()
    if time_left is not None and time_left < 2 * STOP_MARGIN_S:
        add_record(output, _mode_record(run, "no-time", reason="the table's time limit"))
        return
    command = [sys.executable, *MEASURE, "--mode", run.mode]
    command += [*run.settings.to_argv(), "--output", str(output)]
    if time_left is not None:
        command += ["--time-limit", str(time_left - STOP_MARGIN_S)]
    if note is not None:
        command += ["--note", note]
    environment = {COMMAND_VARIABLE: command_line()}
    with (
        tempfile.TemporaryDirectory() as cache,
        logged_process(
            command,
            log,
            environment | (empty_caches(Path(cache)) if fresh_cache else {}),
            PATIENCE_S,
        ) as process,
    ):
        in_time = _wait(process, output, run, time_left)
    if not in_time:
        add_record(output, _mode_record(run, "no-time", reason="killed at the time limit"))
    elif process.returncode != 0:
        reason = f"exit status {process.returncode}"
        end = log_tail(log)
        add_record(output, _mode_record(run, "error", reason=reason, error=end))
        print(f"{run.name}: {reason}; the end of its log:", *end.splitlines()[-12:], sep="\n")


def _wait(
    process: subprocess.Popen[bytes], output: Path, run: Run, time_left: float | None
) -> bool:
    """Print records as they come until the process ends; False if time ran out before."""
    start, seen = time.monotonic(), load_records(output)
    while True:
        running = process.poll() is None
        records = load_records(output)
        for record in records:
            if record not in seen:
                print(f"{run.name}: {describe(record)}", flush=True)
        seen = records
        if not running:
            return True
        if time_left is not None and time.monotonic() - start > time_left:
            return False
        time.sleep(0.5)


def _mode_record(run: Run, status: str, **facts: str) -> Record:
    return {
        "kind": "decode",
        "mode": run.mode,
        "settings": run.settings.identity(),
        "provenance": provenance(),
        "status": status,
        **facts,
    }


def current(records: list[Record], runs: list[Run]) -> Iterator[Record]:
    """Records of this table, with the baseline that an earlier one left in the file."""
    known = [(run.mode, run.settings.identity()) for run in runs]
    baseline = baseline_settings(runs[0].settings.identity())
    for record in records:
        is_baseline = (
            record["mode"] == "plain" and baseline_settings(record["settings"]) == baseline
        )
        if is_baseline or (record["mode"], record["settings"]) in known:
            yield record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--num-speculative-tokens", nargs="+", type=int, help="K, or several.")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(DEFAULT_MODES))
    parser.add_argument("--bandwidth", type=float, help="TB/s of the GPU, for the limits.")
    parser.add_argument("--time-limit", type=float, help="Seconds for the whole table.")
    parser.add_argument(
        "--fresh-cache",
        action="store_true",
        help="Give each process empty compile caches: fair start times, slower starts.",
    )
    parser.add_argument("--no-table", action="store_true", help="Print the cells alone.")
    parser.add_argument("--note", help="A sentence on the setting, kept with every cell.")
    parser.add_argument("--output", type=Path, help="Result file.")
    parser.add_argument("--resume", action="store_true", help="Go on with --output.")
    args = parser.parse_args()
    several = args.num_speculative_tokens
    args.num_speculative_tokens = several[0] if several else None
    try:
        settings = settings_from(args)
    except ValueError as error:
        parser.error(str(error))
    if settings.model is None and set(args.modes) & set(TRANSFORMERS_MODES):
        parser.error("--modes transformers… needs --model: it verifies drafts for real.")
    if args.output is not None and args.output.exists() and not args.resume:
        parser.error(f"--output={args.output} exists. Add --resume, or choose another file.")
    runs = plan(args.modes, settings, several or [settings.num_speculative_tokens])
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    with tempfile.TemporaryDirectory() as scratch:
        output = args.output or Path(scratch) / "results.json"
        logs = output.with_suffix(".logs")
        for run in runs:
            log = logs / f"{run.name}.log"
            run_mode(run, output, log, deadline, args.fresh_cache, args.note)
        records = list(current(load_records(output), runs))
    if not args.no_table:
        Console(width=150).print(rich_table(rows(records, args.bandwidth)))
    statuses = {record["status"] for record in records}
    if "error" in statuses:
        sys.exit(1)
    if "no-time" in statuses:
        sys.exit(OUT_OF_TIME)


if __name__ == "__main__":
    main()
