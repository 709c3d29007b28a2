# SPDX-License-Identifier: Apache-2.0
"""Run a command with its output in a log: ``python tools/run_logged.py LOG WHAT COMMAND...``.

The terminal shows WHAT, and the command's own phases: its lines that begin with "+ ". If it fails,
the end of the log follows. It runs before anything is installed, on Python alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from pathlib import Path

NUM_LINES = 15
"""Of the log's end, where the command fails."""


def run(log: Path, what: str, command: list[str]) -> int:
    """Run the command; its exit status."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)

    log.parent.mkdir(parents=True, exist_ok=True)
    say(what)
    end: deque[str] = deque(maxlen=NUM_LINES)
    with (
        log.open("w", encoding="utf-8") as stream,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            stream.write(line)
            stream.flush()
            end.append(line.rstrip())
            if line.startswith("+ "):
                say(f"  {line[2:].rstrip()}")
    if process.returncode == 0:
        say("done")
    else:
        print(*end, sep="\n")
        say(f"failed with exit status {process.returncode}. The whole log: {log}")
    return process.returncode


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
