# SPDX-License-Identifier: Apache-2.0
"""A table whose processes take turns: every mode's engine stays alive, and each measures a little.

Two engines after each other are minutes apart, and a machine that others share changes in seconds.
So all engines start first. Then, cell by cell, each mode measures it once, and again in the next
round, A B A B: what is compared is seconds apart. All engines must fit in memory at once.

A mode whose process ends takes no more turns. At the time limit the turn under way is lost.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.decode.processes import ModeProcess
from benchmarks.decode.running import (
    NO_TIME,
    RunOptions,
    keep_error,
    mode_record,
    print_new,
    started,
)
from benchmarks.decode.turns import Turn
from benchmarks.engines.results import add_record, load_records
from benchmarks.engines.settings import DecodeCell
from vllm_layerskip.errors import UserError

_POLL_S = 0.5
_END_S = 20.0
"""How long an engine may take to end by itself."""


class _OutOfTimeError(Exception):
    """The table's time limit came."""


class _ProcessEndedError(Exception):
    """A mode's process ended before its time."""


class _TurnTaker:
    """A mode's process that measures when it gets a turn.

    Args:
        turns: what it is to measure.
    """

    process: subprocess.Popen[bytes]
    pipe: Connection

    def __init__(
        self, one: ModeProcess, turns: set[Turn], output: Path, log: Path, options: RunOptions
    ) -> None:
        self.one, self.turns = one, turns
        self._output, self._log, self._options = output, log, options
        self._started = contextlib.ExitStack()
        self.failed = False

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        self._require_time()
        self.pipe, theirs = Pipe()
        self._started.callback(self.pipe.close)
        with theirs:  # So that the end of the process closes the pipe.
            number = theirs.fileno()
            process = started(
                self.one, self._output, self._log, self._options, ["--turns", str(number)], [number]
            )
            self.process = self._started.enter_context(process)
        self._wait_until_ready()

    def measure(self, turn: Turn) -> None:
        """Give the process a turn and wait for its end."""
        self._require_time()
        seen = load_records(self._output)
        with contextlib.suppress(OSError):  # Of a process that ended: that is found out next.
            self.pipe.send(tuple(turn))
        self._wait_until_ready()
        print_new(_in_round(self.one, turn.round), self._output, seen)
        self.turns.remove(turn)

    def keep_failure(self) -> None:
        """End what is left of a process that ended, and keep its error."""
        self.failed = True
        self.let_go()
        self.end()
        keep_error(self._rounds_left(), self.process, self._output, self._log)

    def keep_lack_of_time(self) -> None:
        """Keep that turns are left; only when the process, which writes too, has ended."""
        if self.turns and not self.failed:
            for one in self._rounds_left():
                add_record(self._output, mode_record(one, "no-time", reason=NO_TIME))

    def let_go(self) -> None:
        """Have the process, which was started, end by itself."""
        self.pipe.close()

    def end(self) -> None:
        """Wait until the process has ended, and end what is left of it and of what it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.kill()

    def kill(self) -> None:
        """End the process now."""
        self._started.close()

    def _rounds_left(self) -> list[ModeProcess]:
        return [_in_round(self.one, number) for number in sorted({t.round for t in self.turns})]

    def _wait_until_ready(self) -> None:
        try:
            while not self.pipe.poll(_POLL_S):
                self._require_time()
                if self.process.poll() is not None:
                    raise _ProcessEndedError
            self.pipe.recv()
        except (EOFError, OSError):
            raise _ProcessEndedError from None

    def _require_time(self) -> None:
        if self._options.is_over:
            raise _OutOfTimeError


def run_interleaved(
    table: Sequence[ModeProcess], num_rounds: int, output: Path, logs: Path, options: RunOptions
) -> None:
    """Start all processes, then let them take turns; whatever comes of it is in ``output``."""
    takers = []
    for number, one in enumerate(table, start=1):
        turns = {Turn(c, n) for c in one.settings.cells() for n in range(1, num_rounds + 1)}
        log = logs / f"{number}-{one.name}.log"
        takers.append(_TurnTaker(one, turns, output, log, options))
    with contextlib.ExitStack() as stack:
        for taker in takers:
            stack.callback(taker.kill)
        with contextlib.suppress(_OutOfTimeError):
            _take_all_turns(takers, table[0].settings.cells(), num_rounds)
            for taker in takers:  # They end at the same time.
                taker.let_go()
            for taker in takers:
                taker.end()
    for taker in takers:
        taker.keep_lack_of_time()


def check_memory(table: Sequence[ModeProcess]) -> None:
    """Refuse engines that ask for more of a GPU than there is.

    Raises:
        UserError: the shares of all engines of the table are more than the whole, as by default.
    """
    settings = table[0].settings
    share = settings.engine_args.get("gpu_memory_utilization")
    fits = isinstance(share, int | float) and 0 < share * len(table) <= 1
    if settings.device == "cuda" and len(table) > 1 and not fits:
        asks = "its default" if share is None else f"gpu_memory_utilization={share!r}"
        fitting = f'{{"gpu_memory_utilization": {0.9 / len(table):.2f}}}'
        raise UserError(
            f"--interleave keeps {len(table)} engines alive, and each asks for {asks}, a share of "
            f"the GPU's memory. Give them shares that fit, such as --engine-args '{fitting}'."
        )


def _take_all_turns(
    takers: Sequence[_TurnTaker], cells: Sequence[DecodeCell], num_rounds: int
) -> None:
    for taker in takers:
        try:
            taker.start()
        except _ProcessEndedError:
            taker.keep_failure()
    for turn in (Turn(cell, number) for cell in cells for number in range(1, num_rounds + 1)):
        for taker in takers:
            if taker.failed:
                continue
            try:
                taker.measure(turn)
            except _ProcessEndedError:
                taker.keep_failure()


def _in_round(one: ModeProcess, number: int) -> ModeProcess:
    return replace(one, settings=replace(one.settings, round=number))
