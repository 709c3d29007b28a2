# SPDX-License-Identifier: Apache-2.0
"""What vLLM's processes write: kept while it passes through, and the error in it."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_NUM_KEPT_LINES = 500
_PATIENCE_S = 5.0
"""How long to wait for the last words of processes that failed."""

# "(EngineCore pid=12) ERROR 11-27 17:59:22 [core.py:11] ValueError: why", as vLLM logs it, and
# "[rank0]: ValueError: why" of torch.
_PREFIX = re.compile(
    r"^(\([\w\s=.-]*\)\s)*(\[rank\d+\]: )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
_ERROR = re.compile(r"^([\w.]*(Error|Exception|Exit|Interrupt)|[\w. -]+: error): ")
"""As Python and argparse write errors."""
_ELSEWHERE = re.compile("root cause|See stack trace|initialization failed")
"""In an error that only says that another process failed."""


@contextmanager
def output_kept(lines: deque[str]) -> Iterator[None]:
    """Keep what this process and those that it starts write, besides showing it.

    A process that is started in the block writes through this one until it ends.

    Args:
        lines: gets the last lines, and has all of them if the block fails.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    copiers = [_Copier(descriptor, lines) for descriptor in (1, 2)]
    try:
        yield
    except BaseException:
        for copier in copiers:
            copier.stop(_PATIENCE_S)
        raise
    else:
        for copier in copiers:
            copier.stop(0)


_descriptors: set[int] = set()
"""Ends of pipes that only this process may have: a copy in a child would keep them open."""


def _close_in_child() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_close_in_child)


class _Copier:
    """Copies what is written to a descriptor to where it went before, and into lines."""

    def __init__(self, descriptor: int, lines: deque[str]) -> None:
        self._descriptor, self._lines = descriptor, lines
        self._target = os.dup(descriptor)
        self._source, into = os.pipe()
        os.dup2(into, descriptor)
        os.close(into)
        _descriptors.update((self._source, self._target))
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def stop(self, patience_s: float) -> None:
        """Let this process write as before; processes that it has started are still copied."""
        (sys.stdout if self._descriptor == 1 else sys.stderr).flush()
        os.dup2(self._target, self._descriptor)
        self._thread.join(patience_s)

    def _copy(self) -> None:
        begun = b""
        while content := os.read(self._source, 1 << 16):
            os.write(self._target, content)
            *whole, begun = (begun + content).split(b"\n")
            self._lines.extend(line.decode(errors="replace") for line in whole)
        for descriptor in (self._source, self._target):
            _descriptors.discard(descriptor)
            os.close(descriptor)


def kept_lines() -> deque[str]:
    """For ``output_kept``."""
    return deque(maxlen=_NUM_KEPT_LINES)


def last_error(lines: Sequence[str]) -> str | None:
    """The last error that Python processes wrote, in one line; None if there is none.

    Errors that only point to another process's error do not count, if there is a better one.
    """
    plain = [_PREFIX.sub("", line.rstrip()) for line in lines]
    errors = [place for place, line in enumerate(plain) if _ERROR.match(line)]
    causes = [place for place in errors if not _ELSEWHERE.search(plain[place])]
    found = causes or errors
    return _whole_message(plain[found[-1] :]) if found else None


def _whole_message(lines: Sequence[str]) -> str:
    """The first line; with pydantic's the lines that follow, since it says nothing by itself."""
    first, *others = lines
    if not re.search(r"validation errors? for \w+$", first):
        return first
    for line in others[:2]:
        first += " " + re.sub(r" *\[type=.*", "", line.strip())
        if line.startswith(" "):
            break
    return first
