# SPDX-License-Identifier: Apache-2.0
"""One process at a time makes a folder; the others wait and then find it finished."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(file: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold a lock on ``file``, which is created, and removed afterwards.

    The system releases the lock of a process that dies, so that nothing stays locked.

    Args:
        waiting: called if another process holds the lock.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    descriptor = _acquire(file, waiting)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # Before the release: whoever waits sees it and starts anew.
        os.close(descriptor)


def _acquire(file: Path, waiting: Callable[[], object]) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still(file, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether the path still names the file that was locked: its last holder removed it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
