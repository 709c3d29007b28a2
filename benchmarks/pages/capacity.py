# SPDX-License-Identifier: Apache-2.0
"""A capacity plan on paper: GPUs and GPU hours with and without LayerSkip.

    python -m benchmarks.pages.capacity --shape llama-3-8b --gpu h100 --prompt 1000 --output 300 \\
        --exit-layer 4 --num-speculative-tokens 4 --acceptance-length 3.0 --tokens-per-s 20000

docs/capacity.md has the formula and its assumptions; ``--write`` makes that page's tables again. An
engine is a group of ``--tp`` GPUs that hold one copy of the model. Nothing here was measured: where
results of your machine exist, use them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.decode.report import markdown
from benchmarks.engines.presets import expected_length, length_for
from benchmarks.pages.tables import write_tables
from vllm_layerskip.measuring.hardware import GPUS, Gpu, find_by_part
from vllm_layerskip.measuring.roofline import NUM_BYTES, Decoding, Roofline
from vllm_layerskip.measuring.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "capacity.md"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Assumptions:
    """What a roofline does not say. The defaults are assumptions, not measurements."""

    decode_efficiency: float = 0.7
    """Share of the roofline that decoding reaches; alike for both."""
    prefill_efficiency: float = 0.5
    all_reduce_s: float = 10e-6
    """What an all-reduce costs besides its bytes."""
    memory_share: float = 0.9
    """vLLM's ``gpu_memory_utilization``; activations and graphs live in the rest."""
    headroom: float = 0.25
    """Capacity above the mean load, for peaks and for GPUs that fail."""
    max_num_seqs: int = 256


@dataclass(frozen=True)
class Engine:
    """One copy of a model on ``tp`` GPUs."""

    shape: Shape
    gpu: Gpu
    tp: int = 1
    dtype: str = "bfloat16"
    assumptions: Assumptions = Assumptions()

    def __post_init__(self) -> None:
        if self.shape.num_kv_heads % self.tp:
            raise ValueError(
                f"--tp {self.tp} must divide the {self.shape.num_kv_heads} K/V heads. Use "
                f"{', '.join(str(n) for n in (1, 2, 4, 8) if self.shape.num_kv_heads % n == 0)}."
            )
        if self.tp > 1 and not self.gpu.link:
            raise ValueError(
                f"--tp {self.tp}: no link between these GPUs is known. Use --tp 1, or a GPU with "
                "NVLink."
            )

    @property
    def _together(self) -> Roofline:
        """The GPUs as one: each holds and reads its share."""
        gpu = Gpu(self.gpu.bandwidth * self.tp, self.gpu.flops * self.tp)
        return Roofline(self.shape, gpu, self.dtype)

    def all_reduces_s(self, num_layers: int, num_tokens: float) -> float:
        """Two a layer, of the hidden states of ``num_tokens``, round a ring."""
        if self.tp == 1:
            return 0.0
        size = num_tokens * self.shape.hidden_size * NUM_BYTES[self.dtype]
        one = self.assumptions.all_reduce_s + 2 * (self.tp - 1) / self.tp * size / self.gpu.link
        return 2 * num_layers * one

    def step_s(self, decoding: Decoding, batch_size: int, context: float) -> float:
        """Seconds of a decoding step."""
        num_layers, exit_layer = self.shape.num_layers, decoding.exit_layer
        num_drafts = decoding.num_speculative_tokens
        if num_drafts == 0:
            reduces = self.all_reduces_s(num_layers, batch_size)
        else:
            late = num_layers - exit_layer
            reduces = (num_drafts + 1) * self.all_reduces_s(
                exit_layer, batch_size
            ) + self.all_reduces_s(late, batch_size * (num_drafts + 1))
        bound = self._together.step_s(decoding, batch_size, context)
        return bound / self.assumptions.decode_efficiency + reduces

    def prefill_s(self, prompt_len: int) -> float:
        """Seconds of one prompt: its FLOPs, attention included."""
        shape = self.shape
        weights = shape.num_layers * shape.layer_weights
        attention = 2 * prompt_len * shape.num_layers * shape.num_heads * shape.head_dim
        flops = prompt_len * (2 * weights + attention)
        compute = flops / (self.gpu.flops * self.tp) / self.assumptions.prefill_efficiency
        return compute + self.all_reduces_s(shape.num_layers, prompt_len)

    def max_batch(self, num_tokens: int, num_drafts: int) -> int:
        """Requests of ``num_tokens`` each whose K/V fit beside weights and exit states; maybe 0."""
        shape, width = self.shape, NUM_BYTES[self.dtype]
        room = self.tp * self.gpu.memory * self.assumptions.memory_share
        room -= shape.num_weights * width
        kv = (num_tokens + num_drafts) * shape.num_layers * shape.kv_values_per_layer * width
        # Hidden states and residual, on every rank.
        exit_states = self.tp * num_drafts * 2 * shape.hidden_size * width
        return max(0, min(self.assumptions.max_num_seqs, math.floor(room / (kv + exit_states))))


@dataclass(frozen=True)
class Load:
    """Requests of one kind."""

    prompt_len: int
    output_len: int
    max_tpot_s: float = math.inf
    """Seconds a token of one request may take."""

    @property
    def context(self) -> float:
        """Mean tokens in the cache of a decoding request."""
        return self.prompt_len + self.output_len / 2


@dataclass(frozen=True)
class Plan:
    """What one engine does under a load."""

    num_speculative_tokens: int
    batch_size: int
    tokens_per_s: float
    """Output tokens, prefill's time included."""
    tpot_s: float
    """Seconds between tokens of one request, without prefill of others."""

    def num_engines(self, tokens_per_s: float, headroom: float) -> int:
        return math.ceil(tokens_per_s * (1 + headroom) / self.tokens_per_s)


def plan(engine: Engine, load: Load, decoding: Decoding) -> Plan | None:
    """The engine at its largest batch that fits and keeps the time a token; None if none does."""
    num_drafts = decoding.num_speculative_tokens
    largest = engine.max_batch(load.prompt_len + load.output_len, num_drafts)

    def tpot_s(batch_size: int) -> float:
        return engine.step_s(decoding, batch_size, load.context) / decoding.acceptance_length

    # The time grows with the batch.
    low, high = 0, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tpot_s(middle) <= load.max_tpot_s else (low, middle - 1)
    if low == 0:
        return None
    seconds = low * engine.prefill_s(load.prompt_len) + load.output_len * tpot_s(low)
    return Plan(num_drafts, low, low * load.output_len / seconds, tpot_s(low))


def layerskip(exit_layer: int, num_drafts: int, length: float, other: int) -> Decoding:
    """LayerSkip with ``other`` drafts, where ``num_drafts`` have the acceptance ``length``."""
    if other == 0:
        return Decoding("plain")
    return Decoding("layerskip", exit_layer, other, length_for(length, num_drafts, other))


def best_plan(engine: Engine, load: Load, decodings: Iterable[Decoding]) -> Plan | None:
    """The plan with the most tokens a second: what a tuned schedule does."""
    plans = [p for decoding in decodings if (p := plan(engine, load, decoding)) is not None]
    return max(plans, key=lambda p: p.tokens_per_s, default=None)


def gpu_hours_per_million(engine: Engine, found: Plan) -> float:
    """GPU hours for a million output tokens, at full use."""
    return engine.tp * 1e6 / found.tokens_per_s / 3600


# Tables of docs/capacity.md.

_H100 = GPUS["NVIDIA H100 80GB HBM3"]
_LENGTHS = (2.0, 2.5, 3.0, 3.5, 4.0)
_MODELS = (("llama-3-8b", 4, 1), ("llama-3-70b", 10, 4))
"""Shape, E, TP; K = 4."""


def _with_k(exit_layer: int, length: float, num_drafts: int = 4) -> list[Decoding]:
    return [layerskip(exit_layer, num_drafts, length, k) for k in range(num_drafts + 1)]


def batch_table() -> str:
    """Speed-up of a step by batch size, and the best K."""
    header = ("model", "GPUs", "batch", "K = 4", "K = 2", "K = 1", "best K", "at the best K")
    rows = []
    for name, exit_layer, tp in _MODELS:
        engine = Engine(SHAPES[name], _H100, tp)
        for batch_size in (1, 8, 32, 64, 128, 256, 512):
            speedups = {}
            plain = engine.step_s(Decoding("plain"), batch_size, 1150)
            for decoding in _with_k(exit_layer, 3.0):
                step = engine.step_s(decoding, batch_size, 1150)
                speedups[decoding.num_speculative_tokens] = (
                    decoding.acceptance_length * plain / step
                )
            best = max(speedups, key=lambda k: speedups[k])
            shown = [f"{speedups[k]:.2f}" for k in (4, 2, 1)]
            rows.append(
                [name, str(tp), str(batch_size), *shown, str(best), f"{speedups[best]:.2f}"]
            )
    return markdown(header, rows)


def limit_table() -> str:
    """One engine under limits of the time a token."""
    header = ("model", "GPUs", "limit a token", "plain tok/s", "LayerSkip tok/s", "ratio",
              "batch (plain, LayerSkip)", "K",
              "GPU hours a million tokens (plain, LayerSkip)")  # fmt: skip
    rows = []
    for name, exit_layer, tp in _MODELS:
        engine = Engine(SHAPES[name], _H100, tp)
        for limit_ms in (8, 20, 50):
            both = _both(engine, exit_layer, limit_ms)
            rows.append([name, str(tp), f"{limit_ms} ms", *_cells(engine, 1.0, *both)])
    return markdown(header, rows)


def fleet_table() -> str:
    """The mean load that a number of GPUs carries at 20 ms a token, with headroom."""
    header = ("model", "GPUs", "plain tok/s", "LayerSkip tok/s", "ratio")
    rows = []
    for name, exit_layer, tp in _MODELS:
        engine = Engine(SHAPES[name], _H100, tp)
        both = _both(engine, exit_layer, 20)
        for num_gpus in (1, 8, 64, 1000):
            if num_gpus >= tp:
                load = num_gpus // tp / (1 + engine.assumptions.headroom)
                rows.append([name, str(num_gpus), *_cells(engine, load, *both)[:3]])
    return markdown(header, rows)


def _both(engine: Engine, exit_layer: int, limit_ms: float) -> tuple[Plan | None, Plan | None]:
    load = Load(1000, 300, limit_ms / 1e3)
    return (
        plan(engine, load, Decoding("plain")),
        best_plan(engine, load, _with_k(exit_layer, 3.0)),
    )


def _cells(engine: Engine, factor: float, plain: Plan | None, ours: Plan | None) -> list[str]:
    """Tokens a second times ``factor``, their ratio, batches, K, GPU hours."""

    def each(text: Callable[[Plan], str]) -> list[str]:
        return ["-" if found is None else text(found) for found in (plain, ours)]

    ratio = "-"
    if plain is not None and ours is not None:
        ratio = f"{ours.tokens_per_s / plain.tokens_per_s:.2f}"
    return [
        *each(lambda p: f"{factor * p.tokens_per_s:,.0f}"),
        ratio,
        ", ".join(each(lambda p: str(p.batch_size))),
        each(lambda p: str(p.num_speculative_tokens))[1],
        ", ".join(each(lambda p: f"{gpu_hours_per_million(engine, p):.3f}")),
    ]


def acceptance_table() -> str:
    """What the acceptance length decides, at a limit of 20 ms a token."""
    header = ("model", "acceptance length at K = 4", "K", "tok/s of an engine",
              "over plain", "GPU hours a million tokens")  # fmt: skip
    rows = []
    for name, exit_layer, tp in _MODELS:
        engine, load = Engine(SHAPES[name], _H100, tp), Load(1000, 300, 0.02)
        plain = plan(engine, load, Decoding("plain"))
        assert plain is not None
        for length in _LENGTHS:
            ours = best_plan(engine, load, _with_k(exit_layer, length))
            assert ours is not None
            rows.append([
                name, f"{length:.1f}", str(ours.num_speculative_tokens),
                f"{ours.tokens_per_s:,.0f}", f"{ours.tokens_per_s / plain.tokens_per_s:.2f}",
                f"{gpu_hours_per_million(engine, ours):.3f}",
            ])  # fmt: skip
    return markdown(header, rows)


def tp_table() -> str:
    """(E, K, TP): computed speed-ups at batch 1 and 32, and the result files that measured them."""
    header = ("model", "E", "K", "TP", "batch 1, computed", "batch 32, computed", "measured")
    rows = []
    for name, exit_layer, num_drafts, length, sizes in (
        ("llama-3-8b", 4, 4, 3.0, (1, 2, 4, 8)),
        ("llama-2-7b", 8, 6, 5.03, (1, 2)),
        ("llama-3-70b", 10, 4, 3.0, (4, 8)),
    ):
        for tp in sizes:
            engine = Engine(SHAPES[name], _H100, tp)
            ours = layerskip(exit_layer, num_drafts, length, num_drafts)
            speedups = [
                length
                * engine.step_s(Decoding("plain"), size, 1150)
                / engine.step_s(ours, size, 1150)
                for size in (1, 32)
            ]
            files = measured_files(name, exit_layer, num_drafts, tp)
            rows.append([
                name, str(exit_layer), str(num_drafts), str(tp),
                *(f"{s:.2f}" for s in speedups), ", ".join(files) or "no",
            ])  # fmt: skip
    return markdown(header, rows)


def measured_files(shape: str, exit_layer: int, num_drafts: int, tp: int) -> list[str]:
    """Result files with LayerSkip at this (E, K, TP) on a GPU."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        records = json.loads(path.read_text(encoding="utf-8")).get("records", [])
        for record in records:
            settings = record.get("settings", {})
            if (
                str(record.get("mode", "")).startswith("layerskip")
                and settings.get("device") == "cuda"
                and settings.get("shape") == shape
                and settings.get("exit_layer") == exit_layer
                and settings.get("num_speculative_tokens") == num_drafts
                and settings.get("engine_args", {}).get("tensor_parallel_size", 1) == tp
            ):
                found.append(path.name)
                break
    return found


TABLES: dict[str, Callable[[], str]] = {
    "batch": batch_table,
    "limit": limit_table,
    "fleet": fleet_table,
    "acceptance": acceptance_table,
    "tp": tp_table,
}


def own_table(args: argparse.Namespace) -> str:
    """The plan for the command line's own load.

    Raises:
        ValueError: an option is wrong; the message names it.
    """
    found = find_by_part(args.gpu)
    if found is None:
        raise ValueError(f"--gpu {args.gpu} is none of {', '.join(GPUS)}.")
    shape = SHAPES[args.shape]
    if not 1 <= args.exit_layer < shape.num_layers:
        raise ValueError(
            f"--exit-layer {args.exit_layer} must be from 1 to {shape.num_layers - 1} for "
            f"{args.shape}."
        )
    for option in ("prompt", "output", "num_speculative_tokens", "tp"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be an integer of at least 1.")
    longest = expected_length(1.0, args.num_speculative_tokens)
    if not 1 <= args.acceptance_length <= longest:
        raise ValueError(
            f"--acceptance-length {args.acceptance_length} must be from 1 to {longest:.0f} for "
            f"--num-speculative-tokens {args.num_speculative_tokens}."
        )
    assumptions = replace(
        Assumptions(), decode_efficiency=args.decode_efficiency, headroom=args.headroom
    )
    name, gpu = found
    engine = Engine(shape, gpu, args.tp, assumptions=assumptions)
    load = Load(args.prompt, args.output, args.max_tpot_ms / 1e3)
    drafts = _with_k(args.exit_layer, args.acceptance_length, args.num_speculative_tokens)
    rows = []
    for label, p in (
        ("plain", plan(engine, load, Decoding("plain"))),
        ("LayerSkip", best_plan(engine, load, drafts)),
    ):
        if p is None:
            rows.append([label, *["does not fit"] * 7])
            continue
        num_gpus = p.num_engines(args.tokens_per_s, args.headroom) * args.tp
        hours = gpu_hours_per_million(engine, p)
        cost = hours * args.price * (1 + args.headroom)
        rows.append([
            label, str(p.num_speculative_tokens), str(p.batch_size), f"{1e3 * p.tpot_s:.2f}",
            f"{p.tokens_per_s:,.0f}", str(num_gpus), f"{hours:.4f}", f"{cost:.3f}",
        ])  # fmt: skip
    header = ("", "K", "batch", "ms a token", "tok/s of an engine", "GPUs for the load",
              "GPU hours a million tokens", "cost a million tokens, with headroom")  # fmt: skip
    return f"{args.shape} on {args.tp} x {name}\n\n{markdown(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=TABLES, help="One of docs/capacity.md's tables.")
    parser.add_argument("--write", action="store_true", help="Make that page's tables again.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--gpu", default="h100", help="A part of its name. Default: h100.")
    parser.add_argument("--tp", type=int, default=1, help="GPUs an engine. Default: 1.")
    parser.add_argument("--prompt", type=int, default=1000, help="Tokens. Default: 1000.")
    parser.add_argument("--output", type=int, default=300, help="Tokens. Default: 300.")
    parser.add_argument("--exit-layer", type=int, default=4, metavar="E")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument(
        "--acceptance-length", type=float, default=3.0, metavar="A", help="At K. Default: 3.0."
    )
    parser.add_argument("--max-tpot-ms", type=float, default=math.inf, help="Limit a token.")
    parser.add_argument("--tokens-per-s", type=float, default=10_000, help="Mean output load.")
    parser.add_argument(
        "--price", type=float, default=1.0, help="Of a GPU hour. Default: 1.0, a unit."
    )
    parser.add_argument("--decode-efficiency", type=float, default=Assumptions.decode_efficiency)
    parser.add_argument("--headroom", type=float, default=Assumptions.headroom)
    args = parser.parse_args()
    if args.write:
        write_tables(PAGE, TABLES)
    elif args.table:
        print(TABLES[args.table]())
    else:
        try:
            print(own_table(args))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
