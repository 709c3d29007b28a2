# SPDX-License-Identifier: Apache-2.0
"""Run the process of a mode, and keep what comes of it in the table's result file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decode.processes import ModeProcess
from benchmarks.decode.summary import describe
from benchmarks.engines.arguments import empty_caches
from benchmarks.engines.results import Record, add_record, load_records
from vllm_layerskip.measuring.processes import log_tail, logged_process, reason_of_failure
from vllm_layerskip.measuring.provenance import COMMAND_VARIABLE, command_line, provenance

MEASURE = ("-m", "benchmarks.decode.measure")
STOP_MARGIN_S = 15.0
"""A mode stops on its own this long before it would be killed."""
PATIENCE_S = 4.0
"""How long a mode that is killed may clean up."""
NO_TIME = "the table's time limit"


@dataclass(frozen=True)
class RunOptions:
    """How the processes of a table run."""

    deadline: float | None = None
    """On ``time.monotonic``."""
    fresh_cache: bool = False
    """Start with empty compile caches, so that starts compare."""
    note: str | None = None
    """A sentence on the setting, for its records."""

    @property
    def time_left(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the deadline has come."""
        time_left = self.time_left
        return time_left is not None and time_left < 0


def run_mode(one: ModeProcess, output: Path, log: Path, options: RunOptions) -> None:
    """Run a mode's process to its end; whatever comes of it is in ``output``."""
    time_left = options.time_left
    if time_left is not None and time_left < 2 * STOP_MARGIN_S:
        add_record(output, mode_record(one, "no-time", reason=NO_TIME))
        return
    arguments: list[str] = []
    if time_left is not None:
        arguments = ["--time-limit", str(time_left - STOP_MARGIN_S)]
    with started(one, output, log, options, arguments) as process:
        in_time = _wait(process, output, one, options)
    if not in_time:
        add_record(output, mode_record(one, "no-time", reason="killed at the time limit"))
    elif process.returncode != 0:
        keep_error([one], process, output, log)


@contextmanager
def started(
    one: ModeProcess,
    output: Path,
    log: Path,
    options: RunOptions,
    arguments: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """The mode's process, which is ended with the block.

    Args:
        arguments: of ``benchmarks.decode.measure``, besides the settings.
        pass_fds: files that it shares with this process.
    """
    environment = {COMMAND_VARIABLE: command_line()}
    with tempfile.TemporaryDirectory() as cache:
        if options.fresh_cache:
            environment |= empty_caches(Path(cache))
        command = [*measure_command(one, output, options.note), *arguments]
        with logged_process(command, log, environment, PATIENCE_S, pass_fds) as process:
            yield process


def measure_command(one: ModeProcess, output: Path, note: str | None = None) -> list[str]:
    command = [sys.executable, *MEASURE, "--mode", one.mode]
    command += [*one.settings.to_argv(), "--round", str(one.settings.round)]
    command += ["--output", str(output)]
    return command if note is None else [*command, "--note", note]


def keep_error(
    rounds: Sequence[ModeProcess], process: subprocess.Popen[bytes], output: Path, log: Path
) -> None:
    """Keep and print why a mode's process ended.

    Args:
        rounds: the mode in each round that lacks a number for it.
    """
    reason = reason_of_failure(process, log)
    for one in rounds:
        add_record(output, mode_record(one, "error", reason=reason, error=log_tail(log)))
    print(f"{rounds[0].name}: {reason}. Its log: {log}", flush=True)


def mode_record(one: ModeProcess, status: str, **facts: str) -> Record:
    """A record of a whole mode that has no number."""
    return {
        "kind": "decode",
        "mode": one.mode,
        "settings": one.settings.identity(),
        "provenance": provenance(),
        "status": status,
        **facts,
    }


def print_new(one: ModeProcess, output: Path, seen: list[Record]) -> list[Record]:
    """Print the records of ``output`` that are not among ``seen``; all records."""
    records = load_records(output)
    for record in records:
        if record not in seen:
            print(f"{one.name}: {describe(record)}", flush=True)
    return records


def _wait(
    process: subprocess.Popen[bytes], output: Path, one: ModeProcess, options: RunOptions
) -> bool:
    """Print records as they come until the process ends; False if time ran out before."""
    seen = load_records(output)
    while True:
        running = process.poll() is None
        seen = print_new(one, output, seen)
        if not running:
            return True
        if options.is_over:
            return False
        time.sleep(0.5)
