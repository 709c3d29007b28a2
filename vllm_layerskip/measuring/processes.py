# SPDX-License-Identifier: Apache-2.0
"""Processes that are started, logged, and ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_layerskip.host.process_output import last_error

LOG_TAIL_CHARS = 3000
PATIENCE_S = 20.0
"""How long a process may clean up before it is killed."""


@contextmanager
def logged_process(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    patience_s: float = PATIENCE_S,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` with its output in ``log``; if it still runs at the end of the block, end it.

    SIGTERM ends the block, too.

    Args:
        environment: variables besides this process's own.
        patience_s: seconds that it gets to clean up before it is killed.
        pass_fds: files that it shares with this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with exit_on_sigterm(), log.open("w", encoding="utf-8") as stream:
        # A session of its own, so that vLLM's engine processes can be ended with it.
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            pass_fds=pass_fds,
        )
        try:
            yield process
        finally:
            _end(process, patience_s)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143) in the block, so that the block ends what it started.

    A second SIGTERM is ignored, since it would interrupt that. Where somebody handles SIGTERM
    already, a block around this one too, it stays as it is, and in threads, which get no signals.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(signum: int, frame: object) -> None:
        signal.signal(signum, signal.SIG_IGN)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def log_tail(log: Path) -> str:
    """The end of a log, where errors are."""
    return log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARS:]


def reason_of_failure(process: subprocess.Popen[bytes], log: Path) -> str:
    """Why a process failed: its status, and the last error in its log, in one line.

    Without an error there it is the log's last line. What a signal killed wrote no error.
    """
    if process.returncode < 0 and process.returncode != -signal.SIGTERM:
        return f"killed by {signal.Signals(-process.returncode).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    written = [line.strip() for line in lines if line.strip()]
    status = f"exit status {process.returncode}"
    if not written:
        return f"{status}; it wrote nothing"
    return f"{status}: {(last_error(lines) or written[-1]).rstrip('.')}"


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """End the whole session, also what its leader left running: SIGTERM, then SIGKILL.

    A process that hangs in a GPU's driver survives both, and is left.
    """
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # A leader that ended may have left some.
            os.killpg(process.pid, kind)
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            continue
