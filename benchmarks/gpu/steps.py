# SPDX-License-Identifier: Apache-2.0
"""The steps of a GPU session: which parts each has, and their time limits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.carry_model import QUESTIONS_NAME, WHEEL_NAME
from benchmarks.gpu.session import LOGS, Part
from vllm_layerskip.errors import UserError

REHEARSAL_FACTOR = 4.0
"""How much longer a rehearsal's parts may take than those on a GPU."""

BATCHES = ("1", "4", "16", "32", "64", "128")
REHEARSAL = ("--device", "cpu", "--tiny")

GRAPHS_ALONE = (
    "torch.compile and JIT warm-up are off here, to start in half the time: FULL decode graphs "
    "alone. Norms and activations are vLLM's own fused kernels then. draft-model's drafts have no "
    "CUDA graphs in vLLM 0.32, so this setting costs that mode more than torch.compile would."
)


@dataclass(frozen=True)
class PartMaker:
    """Makes the parts of a step, for a GPU or for a rehearsal."""

    results: Path
    """Where the parts write."""
    tiny: bool
    """A rehearsal on a CPU."""
    questions: str | None
    """Spec-Bench's file, for ``serve`` and the real model."""
    carried: Path | None = None
    """Where ``carry_model`` unpacked the real model; None: nothing has arrived."""

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
        self, name: str, limit_s: float, file: str, setting: Sequence[str], *arguments: str
    ) -> Part:
        """A table of ``benchmarks.decode.compare``, added to the result file ``file``."""
        output = str(self.results / f"{file}.json")
        common = ("--output", output, "--resume", "--time-limit", "{seconds}", "--no-table")
        if self.tiny:
            setting = (*REHEARSAL, "--preset", "tiny", "--batch-sizes", "1", "2")
        options = (*common, *setting, *arguments)
        return self.module(name, limit_s, "decode.compare", *options, num_lines=12)

    def graphs_alone(self) -> tuple[str, ...]:
        """Options for engines with FULL decode graphs, without what else makes a start slow."""
        if self.tiny:
            return ("--note", GRAPHS_ALONE)
        engine = {
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "kernel_config": {"enable_jit_warmup": False},
            "gpu_memory_utilization": 0.85,
        }
        return ("--engine-args", json.dumps(engine), "--note", GRAPHS_ALONE)


def first(make: PartMaker) -> list[Part]:
    """The numbers that matter: exact tokens, the demo, the paper's setting, EAGLE-3's model."""
    device = ("--device", "cpu") if make.tiny else ()
    few = ("--num-prompts", "2") if make.tiny else ()
    graphs = make.graphs_alone()
    seven = ("--preset", "7b-cnndm", "--batch-sizes", "1", "32")
    eight = ("--preset", "8b-vocab32k", "--batch-sizes", "1", "128")
    schedule = "[[1, 1, 4], [2, 2, 0]]" if make.tiny else "[[1, 127, 4], [128, 128, 0]]"
    return [
        make.module("gpu", 35, "gpu.facts", *device,
                    "--output", str(make.results / "gpu.json")),
        # The first engines of a cold machine: bytecode, kernels, nothing is cached yet.
        make.module("exact", 120, "gpu.check_graphs",
                    "--output", str(make.results / "exact.json")),
        make.python("demo", 105, "examples/demo.py", "--model", "embedded", *few,
                    "--log", str(make.results / LOGS / "demo-engines.log"), num_lines=24),
        make.compare("7b", 105, "first-7b", seven, *graphs, "--modes", "plain", "layerskip"),
        make.compare("7b-peers", 90, "first-7b", seven, *graphs,
                     "--modes", "draft-model", "layerskip-no-reuse"),
        make.compare("8b", 85, "first-8b", eight, *graphs,
                     "--schedule", schedule, "--modes", "plain", "layerskip"),
    ]  # fmt: skip


def bfloat16(make: PartMaker) -> list[Part]:
    """Tokens with the attention that users run: FlashAttention's graphs in bfloat16."""
    file = str(make.results / "bf16.json")
    dtype = ("--dtype", "bfloat16", "--output", file)
    return [make.module("bf16", 150, "gpu.check_graphs", *dtype)]


def twins(make: PartMaker) -> list[Part]:
    """Draft twins on the paper's 7B setting, and all layers in few bits; then a twin's tokens."""
    setting = ("--preset", "7b-cnndm", "--batch-sizes", "1", "8", "32")
    # The most telling first. Acceptance is set: 9.27 as without a twin, and 3.8 as a stock model's.
    drafts = (
        ("2:4:int4", "all:4:int4:3.0", "2:4")
        if make.tiny
        else ("8:12:int4", "all:4:int4:3.8", "8:12", "8:12:fp8", "all:4:fp8:3.8")
    )
    dtype = "float32" if make.tiny else "bfloat16"
    return [
        make.compare("twins", 355, "twins", setting, *make.graphs_alone(),
                     "--modes", "plain", "layerskip", "--drafts", *drafts),
        make.module("twins-bf16", 125, "gpu.check_graphs", "--dtype", dtype,
                    "--draft-quantization", "int4",
                    "--output", str(make.results / "twins-bf16.json")),
    ]  # fmt: skip


def seven_b(make: PartMaker) -> list[Part]:
    """The paper's setting at every batch size, with vLLM's defaults, and its peers."""
    setting = ("--preset", "7b-cnndm", "--batch-sizes", *BATCHES)
    modes = ("plain", "layerskip", "draft-model", "layerskip-no-reuse")
    return [make.compare("7b", 480, "7b", setting, "--modes", *modes)]


def best_k(make: PartMaker) -> list[Part]:
    """The best K of a large batch; a schedule, whose K = 0 must cost what plain decoding costs."""
    some_k = ("2",) if make.tiny else ("6", "3")
    schedule = (
        "[[1, 1, 4], [2, 2, 0]]"
        if make.tiny
        else "[[1, 8, 12], [9, 32, 6], [33, 127, 3], [128, 128, 0]]"
    )
    large = ("--preset", "7b-cnndm", "--batch-sizes", "16", "32", "64", "128")
    all_sizes = ("--preset", "7b-cnndm", "--batch-sizes", *BATCHES)
    return [
        make.compare("k", 320, "7b", large, "--modes", "layerskip",
                     "--num-speculative-tokens", *some_k),
        make.compare("schedule", 160, "7b", all_sizes, "--modes", "layerskip",
                     "--schedule", schedule),
    ]  # fmt: skip


def eight_b(make: PartMaker) -> list[Part]:
    """EAGLE-3's model, with and without a draft vocabulary."""
    setting = ("--batch-sizes", *BATCHES)
    return [
        make.compare("8b", 340, "8b", ("--preset", "8b-vocab32k", *setting),
                     "--modes", "plain", "layerskip"),
        make.compare("8b-all-ids", 140, "8b", ("--preset", "8b", *setting), "--modes", "layerskip"),
    ]  # fmt: skip


def _trained_model(make: PartMaker) -> Path:
    return make.results / "layerskip-model"


def _trained_table(make: PartMaker, name: str, limit_s: float, *modes: str) -> Part:
    model = ("--model", str(_trained_model(make)), "--output", str(make.results / "trained.json"))
    setting = REHEARSAL if make.tiny else ("--batch-sizes", *BATCHES)
    options = ("--resume", "--time-limit", "{seconds}", "--no-table", "--modes", *modes)
    return make.module(name, limit_s, "decode.compare", *model, *setting, *options, num_lines=12)


def trained(make: PartMaker) -> list[Part]:
    """Real acceptance on held-out prompts: trains 160 M parameters first."""
    size = (
        ("--size", "tiny", "--minutes", "1", "--corpus-mb", "1", "--packages")
        if make.tiny
        else ("--size", "160m", "--minutes", "3.5")
    )
    scores = str(make.results / "trained-scores.json")
    train = make.module(
        "train", 260, "decode.train_model", *size, "--copy-scores", scores,
        "--output", str(_trained_model(make)),
    )  # fmt: skip
    return [train, _trained_table(make, "trained", 220, "plain", "layerskip", "draft-model")]


def trained_peers(make: PartMaker) -> list[Part]:
    """The same checkpoint with its peers; needs ``trained`` on the same machine."""
    modes = ("transformers", "transformers-assistant", "ngram", "early-exit", "layerskip-no-reuse")
    return [_trained_table(make, "trained-peers", 300, *modes)]


SELF_CHATS_ENGINE = {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 4, 16, 64, 128, 256, 512, 768, 1024],
    },
    "kernel_config": {"enable_jit_warmup": False},
    "gpu_memory_utilization": 0.7,
}
"""An engine that starts fast and answers a thousand requests at once."""


def real_model(make: PartMaker) -> list[Part]:
    """A draft adapter for SmolLM2-135M-Instruct: its own chats, training, acceptance."""
    results, wheel = make.results, _carried(make) / WHEEL_NAME
    folder, chats = results / REAL_MODEL, results / "real-chats.jsonl"
    # More chats than there is time for: the time ends it.
    size = (
        ("--num-chats", "4", "--device", "cpu", "--max-num-seqs", "4", "--max-model-len", "512",
         "--max-question-tokens", "96", "--max-answer-tokens", "48", "--temperature", "0.7",
         "--engine-args", '{"kv_cache_memory_bytes": 67108864, "enforce_eager": true}')
        if make.tiny
        else ("--num-chats", "8000", "--max-num-seqs", "1024", "--max-model-len", "2048",
              "--max-question-tokens", "256", "--max-answer-tokens", "384",
              "--engine-args", json.dumps(SELF_CHATS_ENGINE))
    )  # fmt: skip
    few = ("--tiny", "--max-steps", "2") if make.tiny else ()
    # Fixed, so that what earlier parts leave goes to acceptance.
    chats_s, training_s = (
        f"{seconds * (REHEARSAL_FACTOR if make.tiny else 1):.0f}" for seconds in (107, 187)
    )
    return [
        make.python("convert", 75, "-m", "vllm_layerskip.commands.main", "example-model",
                    str(folder), "--from", str(wheel)),
        make.module("chats", 115, "gpu.self_chats", "--time-limit", chats_s,
                    "--output", str(chats), "--", "--model", str(folder), *size,
                    "--keep-unfinished", "--exclude", _questions(make)),
        make.module("adapter", 195, "gpu.draft_adapter", "--model", str(folder),
                    "--chats", str(chats), "--time-limit", training_s, *few,
                    "--output", str(results / ADAPTER),
                    "--archive", str(results / f"{ADAPTER}.tar.gz"),
                    "--facts", str(results / "real-adapter.json"), num_lines=10),
        _acceptance(make, "accept", 135, "bfloat16"),
        # Most of its time is what others leave; `real-model-f32` goes on with it.
        _acceptance(make, "accept-f32", 40, "float32"),
    ]  # fmt: skip


def real_model_float32(make: PartMaker) -> list[Part]:
    """The same acceptance in float32, where answers must be equal; needs ``real-model``."""
    _carried(make)
    return [_acceptance(make, "accept-f32", 200, "float32")]


REAL_MODEL, ADAPTER = "SmolLM2-135M-Instruct", "adapter"
"""Folders in the results."""


def _acceptance(make: PartMaker, name: str, limit_s: float, dtype: str) -> Part:
    return make.module(
        name, limit_s, "gpu.acceptance", "--model", str(make.results / REAL_MODEL),
        "--adapter", str(make.results / ADAPTER), "--questions", _questions(make),
        "--dtype", dtype, *["--tiny"] * make.tiny,
        "--output", str(make.results / f"real-{dtype}.json"), num_lines=16,
    )  # fmt: skip


def _carried(make: PartMaker) -> Path:
    if make.carried is None:
        raise UserError(
            "real-model: the model has not arrived. Carry both parts and run python3 -m "
            "benchmarks.gpu.carry_model --arrive .model with each (docs/gpu.md)."
        )
    return make.carried


def _questions(make: PartMaker) -> str:
    return make.questions or str(_carried(make) / QUESTIONS_NAME)


def serve(make: PartMaker) -> list[Part]:
    """``vllm bench serve`` with Spec-Bench."""
    if not make.questions:
        raise UserError("serve: set the variable QUESTIONS to Spec-Bench's question.jsonl.")
    options = [
        *("--questions", make.questions, "--output", str(make.results / "serve.json")),
        *("--resume", "--time-limit", "{seconds}", "--modes", "plain", "layerskip"),
    ]
    if make.tiny:
        options += [
            *(*REHEARSAL, "--model", "vllm_layerskip/checkpoint", "--concurrency", "1", "2"),
            *("--max-prompt-tokens", "128", "--min-requests", "2", "--requests-per-slot", "1"),
        ]
    else:
        options += ["--preset", "7b-cnndm"]
    return [make.module("serve", 440, "serve.bench", *options)]


def one_b(make: PartMaker) -> list[Part]:
    """A small model; every start with empty caches, so that starts compare."""
    setting = ("--preset", "1b", "--batch-sizes", *BATCHES)
    modes = ("--fresh-cache", "--modes", "plain", "layerskip")
    return [make.compare("1b", 440, "1b", setting, *modes)]


def long_prompts(make: PartMaker) -> list[Part]:
    """Prompts of 2,000 tokens: the KV cache's share of the bytes."""
    setting = ("--preset", "7b-cnndm", "--batch-sizes", *BATCHES, "--prompt-lens", "2000")
    return [make.compare("7b-long", 440, "7b-long", setting, "--modes", "plain", "layerskip")]


def thirteen_b(make: PartMaker) -> list[Part]:
    """The paper's second model."""
    setting = ("--preset", "13b-cnndm", "--batch-sizes", "1", "4", "16", "32")
    return [make.compare("13b", 440, "13b", setting, "--modes", "plain", "layerskip")]


STEPS: dict[str, Callable[[PartMaker], list[Part]]] = {
    "first": first,
    "bf16": bfloat16,
    "real-model": real_model,
    "real-model-f32": real_model_float32,
    "twins": twins,
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
REAL_MODEL_LIMIT_S = 560
STEP_LIMIT_S = 480
"""What all parts of a step may take together."""
