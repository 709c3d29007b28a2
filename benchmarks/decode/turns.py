# SPDX-License-Identifier: Apache-2.0
"""Turns: a mode's process measures one cell when the table says so, and waits for the next.

The table and each of its processes share a pipe. The process says ``READY`` when its engine has
started and after every turn; the table answers with the next turn, or closes the pipe. A process
that waits reads from the pipe, so it takes no core from the one whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

from benchmarks.engines.settings import DecodeCell

READY = "ready"


class Turn(NamedTuple):
    """What a process measures at once."""

    cell: DecodeCell
    round: int


def take_turns(table: Connection) -> Iterator[Turn]:
    """The turns that the table gives this process, until it closes the pipe.

    A turn counts as measured when the next one is asked for.
    """
    while True:
        try:
            table.send(READY)
            cell, number = table.recv()
        except (EOFError, ConnectionError):
            return
        yield Turn(DecodeCell(*cell), number)
