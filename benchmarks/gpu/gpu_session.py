# SPDX-License-Identifier: Apache-2.0
"""The GPU runs of docs/benchmarks.md, in steps that fit into one command of a GPU lease.

    bash benchmarks/gpu_session.sh first          # the numbers that matter, in nine minutes
    bash benchmarks/gpu_session.sh 7b k           # one later step, or several
    bash benchmarks/gpu_session.sh --tiny first   # a rehearsal on a CPU

A step has a few parts, each with a time limit. Results go to ``$RESULTS`` (default:
layerskip-results in the temporary folder), where a later step finds them, and to ``$OUT`` if that
is set. ``$QUESTIONS`` names Spec-Bench's question.jsonl for ``serve``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engines.command_line import make_parser, mistakes_reported
from benchmarks.gpu import carry_model
from benchmarks.gpu.checkout import entry_points_folder
from benchmarks.gpu.session import Outcome, Part, Session
from benchmarks.gpu.steps import STEPS, PartMaker
from benchmarks.gpu.summary import summary
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.hardware import gpu_info
from vllm_layerskip.measuring.provenance import COMMAND_VARIABLE, COMMIT_VARIABLE, commit

ROOT = Path(__file__).parents[2]


def prepare_environment(results: Path, tiny: bool) -> None:
    """Set variables for every part: no network, caches that steps share, a plugin that is found."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("VLLM_CACHE_ROOT", str(results / "caches" / "vllm")),
        ("TORCHINDUCTOR_CACHE_DIR", str(results / "caches" / "inductor")),
        ("TRITON_CACHE_DIR", str(results / "caches" / "triton")),
    ):
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("flashinfer") is None:
        # vLLM imports it for top-k and top-p on a GPU, unless it is told not to.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if (site := carry_model.default_folder() / carry_model.SITE).is_dir() and not tiny:
        paths.insert(0, str(site))
    try:
        importlib.metadata.distribution("vllm-layerskip")
    except importlib.metadata.PackageNotFoundError:
        paths.insert(0, str(entry_points_folder(ROOT, results / "site")))
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def report(outcomes: Sequence[Outcome], session: Session) -> int:
    """Print the summary; the exit status."""
    print(session.summarise(), flush=True)
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, prog="gpu_session.sh")
    parser.add_argument("steps", nargs="+", metavar="STEP", help=", ".join([*STEPS, "all"]))
    parser.add_argument("--tiny", action="store_true", help="A rehearsal on a CPU.")
    return parser


def check_machine(tiny: bool) -> None:
    """Check that results of this machine would mean something.

    Raises:
        UserError: there is no GPU, or the results would name no commit.
    """
    if tiny:
        return
    if os.environ.get("TRITON_INTERPRET"):
        raise UserError("TRITON_INTERPRET is set: unset it on a GPU, or add --tiny on a CPU.")
    if not (gpu_info() or Path("/dev/nvidiactl").exists()):
        raise UserError("there is no NVIDIA GPU. Add --tiny for a rehearsal on a CPU.")
    if commit()["id"] is None:
        raise UserError(
            f"the results would name no commit: set {COMMIT_VARIABLE} to its hash, since there is "
            "no git repository here."
        )


def parts_of(names: Sequence[str], make: PartMaker) -> list[Part]:
    """All parts of the steps.

    Raises:
        UserError: a step is unknown, or lacks what it needs.
    """
    names = list(STEPS) if list(names) == ["all"] else names
    for name in names:
        if name not in STEPS:
            raise UserError(f"no step is called {name}. Steps: {' '.join(STEPS)}")
    check_machine(make.tiny)
    return [part for name in names for part in STEPS[name](make)]


def run(args: argparse.Namespace, results: Path) -> int:
    """Run the steps; the exit status.

    Raises:
        UserError: a step cannot run here.
    """
    questions, delivery = os.environ.get("QUESTIONS"), os.environ.get("OUT")
    arrived = carry_model.default_folder()
    carried = arrived if (arrived / carry_model.WHEEL_NAME).exists() else None
    make = PartMaker(results, args.tiny, questions and str(Path(questions).absolute()), carried)
    session = Session(results, Path(delivery).absolute() if delivery else None, summary)
    parts = parts_of(args.steps, make)
    os.chdir(ROOT)
    prepare_environment(results, args.tiny)
    flags = ["--tiny"] * args.tiny
    os.environ[COMMAND_VARIABLE] = " ".join(["bash benchmarks/gpu_session.sh", *flags, *args.steps])
    try:
        outcomes = session.run(parts)
    except BlockingIOError:
        raise UserError(
            f"RESULTS={results} is in use by another session. Wait for it, or end it."
        ) from None
    return report(outcomes, session)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    folder = os.environ.get("RESULTS") or Path(tempfile.gettempdir()) / "layerskip-results"
    with mistakes_reported(parser):
        status = run(args, Path(folder).absolute())
    sys.exit(status)


if __name__ == "__main__":
    main()
