# SPDX-License-Identifier: Apache-2.0
"""The GPU runs of docs/benchmarks.md, in steps that fit into one command of a GPU lease.

    bash benchmarks/gpu_session.sh first          # the numbers that matter, in nine minutes
    bash benchmarks/gpu_session.sh 7b k           # one later step, or several
    bash benchmarks/gpu_session.sh --tiny first   # the same path on a CPU, as a rehearsal

A step is a few parts with a time limit each (``session.py``). Results go to ``$RESULTS`` (default:
layerskip-results in the temporary folder), where a later step finds them, and to ``$OUT`` if that
is set. ``QUESTIONS`` names Spec-Bench's question.jsonl for ``serve``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.checkout import entry_points_folder
from benchmarks.gpu.session import Outcome, Part, Session
from benchmarks.gpu.summary import summary
from vllm_layerskip.measuring.hardware import gpu_info
from vllm_layerskip.measuring.provenance import COMMAND_VARIABLE, COMMIT_VARIABLE, commit

ROOT = Path(__file__).parents[2]
REHEARSAL_FACTOR = 4.0
"""A rehearsal's limits over those of a GPU."""

BATCHES = ("1", "4", "16", "32", "64", "128")
TINY_LOAD = ("--device", "cpu", "--tiny")

GRAPHS_ALONE = (
    "torch.compile and JIT warm-up are off here, to start in half the time: FULL decode graphs "
    "alone. Norms and activations are vLLM's own fused kernels then. draft-model's drafts have no "
    "CUDA graphs in vLLM 0.32, so this setting costs that mode more than torch.compile would."
)


@dataclass(frozen=True)
class Plan:
    """Where a step's parts read and write, and whether it is a rehearsal."""

    results: Path
    tiny: bool
    questions: str | None

    def module(
        self, name: str, limit_s: float, module: str, *arguments: str, num_lines: int = 6
    ) -> Part:
        """A module of ``benchmarks`` as a part."""
        return self.python(name, limit_s, "-m", f"benchmarks.{module}", *arguments,
                           num_lines=num_lines)  # fmt: skip

    def python(self, name: str, limit_s: float, *arguments: str, num_lines: int = 6) -> Part:
        """A call of Python as a part."""
        limit_s *= REHEARSAL_FACTOR if self.tiny else 1.0
        return Part(name, limit_s, (sys.executable, *arguments), num_lines=num_lines)

    def compare(
        self, name: str, limit_s: float, file: str, load: Sequence[str], *arguments: str
    ) -> Part:
        """A table of ``compare.py``, added to the result file ``file``."""
        output = str(self.results / f"{file}.json")
        common = ("--output", output, "--resume", "--time-limit", "{seconds}", "--no-table")
        if self.tiny:
            load = (*TINY_LOAD, "--preset", "tiny", "--batch-sizes", "1", "2")
        options = (*common, *load, *arguments)
        return self.module(name, limit_s, "decode.compare", *options, num_lines=12)

    def graphs_alone(self) -> tuple[str, ...]:
        """Options of engines with FULL decode graphs, and without what else costs a start."""
        if self.tiny:
            return ("--note", GRAPHS_ALONE)
        engine = {
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "kernel_config": {"enable_jit_warmup": False},
            "gpu_memory_utilization": 0.85,
        }
        return ("--engine-args", json.dumps(engine), "--note", GRAPHS_ALONE)


def first(plan: Plan) -> list[Part]:
    """The numbers that matter: exact tokens, the demo, the paper's setting, EAGLE-3's model."""
    device = ("--device", "cpu") if plan.tiny else ()
    few = ("--num-prompts", "2") if plan.tiny else ()
    graphs = plan.graphs_alone()
    seven = ("--preset", "7b-cnndm", "--batch-sizes", "1", "32")
    eight = ("--preset", "8b-vocab32k", "--batch-sizes", "1", "128")
    schedule = "[[1, 1, 4], [2, 2, 0]]" if plan.tiny else "[[1, 127, 4], [128, 128, 0]]"
    return [
        plan.module("gpu", 35, "gpu.facts", *device,
                    "--output", str(plan.results / "gpu.json")),
        # The first engines of a cold machine: bytecode, kernels, nothing is cached yet.
        plan.module("exact", 120, "gpu.check_graphs",
                    "--output", str(plan.results / "exact.json")),
        plan.python("demo", 105, "examples/demo.py", *few, num_lines=20),
        plan.compare("7b", 105, "first-7b", seven, *graphs, "--modes", "plain", "layerskip"),
        plan.compare("7b-peers", 90, "first-7b", seven, *graphs,
                     "--modes", "draft-model", "layerskip-no-reuse"),
        plan.compare("8b", 85, "first-8b", eight, *graphs,
                     "--schedule", schedule, "--modes", "plain", "layerskip"),
    ]  # fmt: skip


def bfloat16(plan: Plan) -> list[Part]:
    """The tokens of the attention that users run: FlashAttention's graphs in bfloat16."""
    file = str(plan.results / "bf16.json")
    dtype = ("--dtype", "bfloat16", "--output", file)
    return [plan.module("bf16", 150, "gpu.check_graphs", *dtype)]


def seven_b(plan: Plan) -> list[Part]:
    """The paper's setting at every batch size, with vLLM's defaults, and its peers."""
    load = ("--preset", "7b-cnndm", "--batch-sizes", *BATCHES)
    modes = ("plain", "layerskip", "draft-model", "layerskip-no-reuse")
    return [plan.compare("7b", 480, "7b", load, "--modes", *modes)]


def best_k(plan: Plan) -> list[Part]:
    """The best K of a large batch; a schedule, whose 0 at batch 128 must cost what plain costs."""
    some_k = ("2",) if plan.tiny else ("6", "3")
    schedule = (
        "[[1, 1, 4], [2, 2, 0]]"
        if plan.tiny
        else "[[1, 8, 12], [9, 32, 6], [33, 127, 3], [128, 128, 0]]"
    )
    large = ("--preset", "7b-cnndm", "--batch-sizes", "16", "32", "64", "128")
    all_sizes = ("--preset", "7b-cnndm", "--batch-sizes", *BATCHES)
    return [
        plan.compare("k", 320, "7b", large, "--modes", "layerskip",
                     "--num-speculative-tokens", *some_k),
        plan.compare("schedule", 160, "7b", all_sizes, "--modes", "layerskip",
                     "--schedule", schedule),
    ]  # fmt: skip


def eight_b(plan: Plan) -> list[Part]:
    """EAGLE-3's model, with and without a draft vocabulary."""
    load = ("--batch-sizes", *BATCHES)
    return [
        plan.compare("8b", 340, "8b", ("--preset", "8b-vocab32k", *load),
                     "--modes", "plain", "layerskip"),
        plan.compare("8b-all-ids", 140, "8b", ("--preset", "8b", *load), "--modes", "layerskip"),
    ]  # fmt: skip


def _trained_model(plan: Plan) -> Path:
    return plan.results / "layerskip-model"


def _trained_table(plan: Plan, name: str, limit_s: float, *modes: str) -> Part:
    model = ("--model", str(_trained_model(plan)), "--output", str(plan.results / "trained.json"))
    load = TINY_LOAD if plan.tiny else ("--batch-sizes", *BATCHES)
    options = ("--resume", "--time-limit", "{seconds}", "--no-table", "--modes", *modes)
    return plan.module(name, limit_s, "decode.compare", *model, *load, *options, num_lines=12)


def trained(plan: Plan) -> list[Part]:
    """Real acceptance on held-out prompts: trains 160 M parameters first."""
    size = (
        ("--size", "tiny", "--minutes", "1", "--corpus-mb", "1", "--packages")
        if plan.tiny
        else ("--size", "160m", "--minutes", "3.5")
    )
    scores = str(plan.results / "trained-scores.json")
    train = plan.module(
        "train", 260, "decode.train_model", *size, "--copy-scores", scores,
        "--output", str(_trained_model(plan)),
    )  # fmt: skip
    return [train, _trained_table(plan, "trained", 220, "plain", "layerskip", "draft-model")]


def trained_peers(plan: Plan) -> list[Part]:
    """The same checkpoint with its peers; needs ``trained`` on the same machine."""
    modes = ("transformers", "transformers-assistant", "ngram", "early-exit", "layerskip-no-reuse")
    return [_trained_table(plan, "trained-peers", 300, *modes)]


def serve(plan: Plan) -> list[Part]:
    """``vllm bench serve`` with Spec-Bench."""
    if not plan.questions:
        raise ValueError("serve: set the variable QUESTIONS to Spec-Bench's question.jsonl.")
    options = [
        *("--questions", plan.questions, "--output", str(plan.results / "serve.json")),
        *("--resume", "--time-limit", "{seconds}", "--modes", "plain", "layerskip"),
    ]
    if plan.tiny:
        options += [
            *(*TINY_LOAD, "--model", "vllm_layerskip/checkpoint", "--concurrency", "1", "2"),
            *("--max-prompt-tokens", "128", "--min-requests", "2", "--requests-per-slot", "1"),
        ]
    else:
        options += ["--preset", "7b-cnndm"]
    return [plan.module("serve", 440, "serve.bench", *options)]


def one_b(plan: Plan) -> list[Part]:
    """A small model; every start with empty caches, so that starts compare."""
    load = ("--preset", "1b", "--batch-sizes", *BATCHES)
    modes = ("--fresh-cache", "--modes", "plain", "layerskip")
    return [plan.compare("1b", 440, "1b", load, *modes)]


def long_prompts(plan: Plan) -> list[Part]:
    """Prompts of 2,000 tokens: the KV cache's share of the bytes."""
    load = ("--preset", "7b-cnndm", "--batch-sizes", *BATCHES, "--prompt-lens", "2000")
    return [plan.compare("7b-long", 440, "7b-long", load, "--modes", "plain", "layerskip")]


def thirteen_b(plan: Plan) -> list[Part]:
    """The paper's second model."""
    load = ("--preset", "13b-cnndm", "--batch-sizes", "1", "4", "16", "32")
    return [plan.compare("13b", 440, "13b", load, "--modes", "plain", "layerskip")]


STEPS: dict[str, Callable[[Plan], list[Part]]] = {
    "first": first,
    "bf16": bfloat16,
    "7b": seven_b,
    "k": best_k,
    "8b": eight_b,
    "trained": trained,
    "trained-peers": trained_peers,
    "serve": serve,
    "1b": one_b,
    "7b-long": long_prompts,
    "13b": thirteen_b,
}
"""Most valuable first; a lease has time for one or two."""

FIRST_LIMIT_S = 540
STEP_LIMIT_S = 480
"""What the parts of a step may take together."""


def prepare_environment(results: Path, tiny: bool) -> None:
    """Variables of every part: no network, caches that steps share, an installed plugin."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("VLLM_CACHE_ROOT", str(results / "caches" / "vllm")),
        ("TORCHINDUCTOR_CACHE_DIR", str(results / "caches" / "inductor")),
        ("TRITON_CACHE_DIR", str(results / "caches" / "triton")),
    ):
        os.environ.setdefault(name, value)
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        importlib.metadata.distribution("vllm-layerskip")
    except importlib.metadata.PackageNotFoundError:
        paths.insert(0, str(entry_points_folder(ROOT, results / "site")))
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def report(outcomes: Sequence[Outcome], session: Session) -> int:
    """Print what came of all; the exit status."""
    print(session.summarise(), flush=True)
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gpu_session.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="+", metavar="STEP", help=", ".join([*STEPS, "all"]))
    parser.add_argument("--tiny", action="store_true", help="A rehearsal on a CPU.")
    args = parser.parse_args()
    names = list(STEPS) if args.steps == ["all"] else args.steps
    for name in names:
        if name not in STEPS:
            parser.error(f"no step is called {name}. Steps: {' '.join(STEPS)}")
    if not args.tiny and os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: unset it on a GPU, or add --tiny on a CPU.")
    if not (args.tiny or gpu_info() or Path("/dev/nvidiactl").exists()):
        parser.error("there is no NVIDIA GPU. Add --tiny for a rehearsal on a CPU.")
    if not args.tiny and commit()["id"] is None:
        parser.error(
            f"the results would name no commit: set {COMMIT_VARIABLE} to its hash, since there is "
            "no git repository here."
        )
    results = Path(
        os.environ.get("RESULTS") or Path(tempfile.gettempdir()) / "layerskip-results"
    ).absolute()
    questions, delivery = os.environ.get("QUESTIONS"), os.environ.get("OUT")
    plan = Plan(results, args.tiny, questions and str(Path(questions).absolute()))
    session = Session(results, Path(delivery).absolute() if delivery else None, summary)
    try:
        parts = [part for name in names for part in STEPS[name](plan)]
    except ValueError as error:
        parser.error(str(error))
    os.chdir(ROOT)
    prepare_environment(results, args.tiny)
    flags = ["--tiny"] * args.tiny
    os.environ[COMMAND_VARIABLE] = " ".join(["bash benchmarks/gpu_session.sh", *flags, *args.steps])
    try:
        outcomes = session.run(parts)
    except BlockingIOError:
        parser.error(f"RESULTS={results} is in use by another session. Wait for it, or end it.")
    sys.exit(report(outcomes, session))


if __name__ == "__main__":
    main()
