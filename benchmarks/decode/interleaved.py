# SPDX-License-Identifier: Apache-2.0
"""A table whose processes take turns: every mode's engine stays alive, and each measures a little.

Two engines after each other are minutes apart, and a machine that others share changes in seconds.
So all engines start first. Then, cell by cell, each mode measures it once, and again in the next
round, A B A B: what is compared is seconds apart. All engines must fit in memory at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import Popen

from benchmarks.decode.processes import ModeProcess
from benchmarks.decode.running import (
    NO_TIME,
    PATIENCE_S,
    RunOptions,
    keep_error,
    mode_record,
    print_new,
    started,
)
from benchmarks.decode.turns import Turn
from benchmarks.engines.results import add_record, finished_cells, load_records
from benchmarks.engines.settings import DecodeCell

_POLL_S = 0.5


class _OutOfTimeError(Exception):
    """The table's time limit came while a process measured."""


@dataclass
class _TurnTaker:
    """A mode's process that measures when it gets a turn."""

    one: ModeProcess
    turns: set[Turn]
    """Those that are still to be measured."""
    process: Popen[bytes]
    pipe: Connection
    output: Path
    log: Path
    options: RunOptions
    round: int = 1
    """Of its turn."""

    def is_ready(self) -> bool:
        """Wait until the process says so; False, with its error kept, if it ended.

        Raises:
            _OutOfTimeError: it did neither within the table's time limit.
        """
        try:
            while not self.pipe.poll(_POLL_S):
                time_left = self.options.time_left
                if time_left is not None and time_left < 0:
                    raise _OutOfTimeError
                if self.process.poll() is not None:
                    raise EOFError
            self.pipe.recv()
        except (EOFError, OSError):
            self.process.wait(PATIENCE_S)
            keep_error(self._in_its_round(), self.process, self.output, self.log)
            return False
        return True

    def measure(self, turn: Turn) -> bool:
        """Give the process a turn and wait for its end; False if the process ended."""
        self.round, seen = turn.round, load_records(self.output)
        with contextlib.suppress(OSError):  # Of a process that ended: that is found out next.
            self.pipe.send(tuple(turn))
        if not self.is_ready():
            return False
        print_new(self._in_its_round(), self.output, seen)
        self.turns.remove(turn)
        return True

    def keep_lack_of_time(self) -> None:
        add_record(self.output, mode_record(self._in_its_round(), "no-time", reason=NO_TIME))

    def _in_its_round(self) -> ModeProcess:
        return _in_round(self.one, self.round)


def run_interleaved(
    table: Sequence[ModeProcess], num_rounds: int, output: Path, logs: Path, options: RunOptions
) -> None:
    """Start all processes, then let them take turns; whatever comes of it is in ``output``."""
    with ExitStack() as stack:
        takers: list[_TurnTaker] = []
        try:
            for one in table:
                turns = _missing_turns(one, num_rounds, output)
                if turns:
                    log = logs / f"{one.name}.log"
                    taker = stack.enter_context(_started(one, turns, output, log, options))
                    takers.append(taker)
                    if not taker.is_ready():
                        takers.remove(taker)
            _give_turns(takers, table[0].settings.cells(), num_rounds)
        except _OutOfTimeError:
            for taker in takers:
                if taker.turns:
                    taker.keep_lack_of_time()


def _give_turns(takers: list[_TurnTaker], cells: Sequence[DecodeCell], num_rounds: int) -> None:
    for cell in cells:
        for number in range(1, num_rounds + 1):
            turn = Turn(cell, number)
            for taker in list(takers):
                if turn in taker.turns and not taker.measure(turn):
                    takers.remove(taker)


def _missing_turns(one: ModeProcess, num_rounds: int, output: Path) -> set[Turn]:
    records = load_records(output)
    missing = set()
    for number in range(1, num_rounds + 1):
        settings = _in_round(one, number).settings
        finished = finished_cells(records, one.mode, settings.identity())
        missing |= {Turn(cell, number) for cell in settings.cells() if cell not in finished}
    return missing


@contextmanager
def _started(
    one: ModeProcess, turns: set[Turn], output: Path, log: Path, options: RunOptions
) -> Iterator[_TurnTaker]:
    pipe, theirs = Pipe()
    arguments = ["--turns", str(theirs.fileno())]
    try:
        with started(one, output, log, options, arguments, [theirs.fileno()]) as process:
            theirs.close()  # So that the end of the process closes the pipe.
            yield _TurnTaker(one, turns, process, pipe, output, log, options)
            pipe.close()
    finally:
        pipe.close()
        theirs.close()


def _in_round(one: ModeProcess, number: int) -> ModeProcess:
    return replace(one, settings=replace(one.settings, round=number))
