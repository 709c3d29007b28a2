# SPDX-License-Identifier: Apache-2.0
"""Runs the parts of a session one after the other, even if some of them fail.

A session has a few minutes of a GPU that somebody else needs next, so

* a part has a time limit of its own, plus the time that earlier parts left unused. A part that
  fails, hangs or is slow takes nothing from later parts;
* what a part has measured is copied to the delivery folder within a second, so it survives if
  the whole session is killed. A delivery that fails stops nothing;
* nothing outlives its part. vLLM's engines are processes of their own and hold the GPU's memory,
  so every descendant is ended after a part, and a session first ends the processes that an
  earlier session left running when it was killed;
* results of other code are set aside first: a number that an earlier session measured must not
  pass for this code's.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.engines.results import OUT_OF_TIME
from vllm_layerskip.files.whole import write_json
from vllm_layerskip.measuring.processes import exit_on_sigterm, logged_process
from vllm_layerskip.measuring.provenance import code_digest, provenance

ARCHIVES = "*.tar.gz"
"""What parts pack to be brought back whole, beside their result files; one has room."""
POLL_S = 0.5
PATIENCE_S = 5.0
"""How long a part that must end may clean up."""
MARGIN_S = 8.0
"""A part that watches its time is told to end this long before the session would end it."""
CLOCK_TOLERANCE_S = 1.0
LEAST_S = 5.0
"""The least time with which a part is begun."""
NOISE = re.compile(r"(INFO|WARNING|DEBUG) \d\d-\d\d |^\[(rank\d+\]:\[)?W\d|\d+%.*\d/\d")
"""Log lines of vLLM and torch, progress bars: in the log, but not on the screen."""
MAX_COLUMNS = 170
MISSING_MODULE = re.compile(r"ModuleNotFoundError: .*")
"""If two parts fail by the same one, the machine lacks what every part needs."""
MAX_DELIVERED = 5
"""The device tool returns eight files: these, the summary, and the archive with the rest."""

STATE = "session.json"
RUNNING = "running.json"
LOGS = "logs"
OLDER = "older"


@dataclass(frozen=True)
class Part:
    """One command of a session."""

    name: str
    limit_s: float
    """Seconds; what earlier parts left unused is added."""
    command: Sequence[str]
    """``{seconds}`` in it stands for the time after which the part should end by itself."""
    num_lines: int = 6
    """How many lines of its output the session prints."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part; ``status`` is ``ok`` or says what happened."""

    name: str
    status: str
    seconds: float


class Session:
    """Runs parts, and keeps and delivers their results.

    Args:
        results: folder of result files and logs, kept for a later session on this machine.
        delivery: folder that gets a copy of them, if any.
        summary: makes the session's page out of ``results``; the page is delivered after each part.
    """

    def __init__(
        self, results: Path, delivery: Path | None, summary: Callable[[Path], str]
    ) -> None:
        self.results = results
        self.delivery = delivery
        self.outcomes: list[Outcome] = []
        self._summary = summary
        self._start = time.monotonic()
        self._delivered: dict[Path, int] = {}

    def run(self, parts: Sequence[Part]) -> list[Outcome]:
        """Run all parts; their outcomes, in order.

        Raises:
            BlockingIOError: another session runs in this results folder.
        """
        (self.results / LOGS).mkdir(parents=True, exist_ok=True)
        with _locked(self.results / "lock"), exit_on_sigterm():
            self._prepare()
            deadline = self._start
            for part in parts:
                deadline += part.limit_s
                try:
                    self._run_part(part, deadline - time.monotonic())
                finally:
                    end_descendants()
                    self._deliver_all()
        return self.outcomes

    def summarise(self) -> str:
        """The page, or the traceback of an error in it, which must not end the session."""
        try:
            return self._summary(self.results)
        except Exception:
            return traceback.format_exc()

    def _prepare(self) -> None:
        end_remembered(self.results / RUNNING)
        adopt_orphans()
        self._provenance = provenance() | {"code": code_digest()}
        self._set_aside_other_code()
        # Earlier sessions delivered their own files.
        self._delivered = {path: path.stat().st_mtime_ns for path in self._result_files()}

    def _set_aside_other_code(self) -> None:
        """Move the results of other sources away, since ``--resume`` would go on with them."""
        state = self.results / STATE
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(state.read_text(encoding="utf-8"))["provenance"]["code"]
            if known == self._provenance["code"]:
                return
            older = self.results / OLDER / str(known)
            older.mkdir(parents=True, exist_ok=True)
            for path in [*self._result_files(), *self.results.glob(ARCHIVES), state]:
                os.replace(path, older / path.name)

    def _result_files(self) -> list[Path]:
        mine = (STATE, RUNNING)
        return [path for path in sorted(self.results.glob("*.json")) if path.name not in mine]

    def _run_part(self, part: Part, limit_s: float) -> None:
        log = self.results / LOGS / f"{part.name}.log"
        start = time.monotonic()
        status = "cut off: the session was ended"
        try:
            if limit_s < LEAST_S:
                status = "not begun: no time was left"
            elif missing := self._missing_module():
                status = f"not begun: two parts ended with {missing}"
            else:
                status = self._wait(part, log, limit_s)
        finally:
            outcome = Outcome(part.name, status, round(time.monotonic() - start, 1))
            self.outcomes.append(outcome)
            with contextlib.suppress(OSError):  # Nobody reads the output any more.
                self._print(part, outcome, log)

    def _missing_module(self) -> str | None:
        """The error of a missing module, if two parts have failed by the same one."""
        seen = set()
        for outcome in self.outcomes:
            if outcome.status.startswith("failed"):
                log = self.results / LOGS / f"{outcome.name}.log"
                errors = MISSING_MODULE.findall(log.read_text(encoding="utf-8", errors="replace"))
                if errors and errors[-1] in seen:
                    return str(errors[-1])
                seen.update(errors[-1:])
        return None

    def _wait(self, part: Part, log: Path, limit_s: float) -> str:
        own_limit = f"{max(limit_s - MARGIN_S, 0):.0f}"
        command = [argument.replace("{seconds}", own_limit) for argument in part.command]
        deadline = time.monotonic() + limit_s
        with logged_process(command, log, {"PYTHONUNBUFFERED": "1"}, PATIENCE_S) as process:
            while time.monotonic() < deadline:
                status = process.poll()
                if status is not None:
                    return _ended(status)
                with contextlib.suppress(OSError):
                    remember_descendants(self.results / RUNNING)
                    self._deliver_results()
                time.sleep(POLL_S)
        return f"stopped: its limit of {limit_s:.0f} s"

    def _print(self, part: Part, outcome: Outcome, log: Path) -> None:
        elapsed = time.monotonic() - self._start
        print(
            f"== {part.name}: {outcome.status} after {outcome.seconds:.0f} s "
            f"({elapsed:.0f} s in all)",
            flush=True,
        )
        if not log.exists() or outcome.status.startswith("not begun"):
            return
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if line.strip() and not NOISE.search(line)]
        shown = lines[-(part.num_lines if outcome.status == "ok" else 25) :]
        print("\n".join(line[:MAX_COLUMNS] for line in shown), flush=True)

    def _deliver_results(self) -> None:
        """Copy the result files that changed since the last call, the first few of them."""
        if self.delivery is None:
            return
        self.delivery.mkdir(parents=True, exist_ok=True)
        for path in [self.results / STATE, *self._result_files()]:
            there = self.delivery / path.name
            if not path.exists() or self._delivered.get(path) == path.stat().st_mtime_ns:
                continue
            others = [p for p in self.delivery.glob("*.json") if p.name != STATE]
            # The state has a place of its own: it is written after results, when a part has ended.
            has_room = path.name == STATE or len(others) < MAX_DELIVERED - 1
            if there.exists() or has_room:
                changed = path.stat().st_mtime_ns
                shutil.copy(path, there)
                self._delivered[path] = changed

    def _deliver_all(self) -> None:
        """State, results, summary, and an archive of everything."""
        with contextlib.suppress(OSError):
            outcomes = [asdict(outcome) for outcome in self.outcomes]
            state = {"outcomes": outcomes, "provenance": self._provenance}
            write_json(self.results / STATE, state)
            if self.delivery is None:
                return
            self._deliver_results()
            for path in self.results.glob(ARCHIVES):
                shutil.copy(path, self.delivery / path.name)
            (self.delivery / "summary.md").write_text(self.summarise(), encoding="utf-8")
            with tarfile.open(self.delivery / "logs.tar.gz", "w:gz") as archive:
                for path in [*sorted(self.results.rglob("*.log")), *self._result_files()]:
                    archive.add(path, path.relative_to(self.results))


def _ended(status: int) -> str:
    if status == OUT_OF_TIME:
        return "incomplete: its own time limit"
    return "ok" if status == 0 else f"failed: exit status {status}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel releases it when this process ends."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies (Linux)."""
    set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kill every descendant, also in process groups of their own, and wait for it."""
    _kill(psutil.Process().children(recursive=True))


def remember_descendants(path: Path) -> None:
    """Write down what runs, for the next session if this one is killed."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            running.append([process.pid, process.create_time()])
    write_json(path, running)


def end_remembered(path: Path) -> None:
    """Kill the processes that a killed session left running."""
    with contextlib.suppress(OSError, ValueError):  # No such file, or a damaged one.
        left = []
        for pid, create_time in json.loads(path.read_text(encoding="utf-8")):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                # Otherwise another process has its number. (The clock's corrections move the time.)
                if abs(process.create_time() - create_time) < CLOCK_TOLERANCE_S:
                    left.append(process)
        _kill(left)
    path.unlink(missing_ok=True)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=PATIENCE_S)
    # Zombies of processes that this one adopted.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
