# SPDX-License-Identifier: Apache-2.0
"""Processes that are started, logged, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LOG_TAIL_CHARS = 3000


@contextmanager
def logged_process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` with its output in ``log``; end it, if need be, with the block.

    Args:
        environment: variables besides this process's own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        # A session of its own, so that vLLM's engine processes can be ended with it.
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            yield process
        finally:
            _end(process)


def log_tail(log: Path) -> str:
    """The end of a log: where an error shows."""
    return log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARS:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask, then kill: the whole session, also what its leader left behind."""
    for kind, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
