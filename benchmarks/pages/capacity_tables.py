# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/capacity.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.engines.markdown import markdown
from benchmarks.pages.capacity_formula import (
    Engine,
    EnginePlan,
    RequestKind,
    best_engine_plan,
    gpu_hours_per_million,
    layerskip,
    layerskip_up_to,
    plan_engine,
)
from benchmarks.pages.tables import ROOT, Tables
from vllm_layerskip.measuring.hardware import GPUS
from vllm_layerskip.measuring.roofline import Decoding
from vllm_layerskip.measuring.shapes import SHAPES

PAGE = ROOT / "docs" / "capacity.md"
RESULTS = ROOT / "benchmarks" / "results"

_H100 = GPUS["NVIDIA H100 80GB HBM3"]
_LENGTHS = (2.0, 2.5, 3.0, 3.5, 4.0)
_MODELS = (("llama-3-8b", 4, 1), ("llama-3-70b", 10, 4))
"""Shape, E, TP; K = 4."""


def batch_table() -> str:
    """Speed-up of a step by batch size, and the best K."""
    header = ("model", "GPUs", "batch", "K = 4", "K = 2", "K = 1", "best K", "at the best K")
    rows = []
    for name, exit_layer, tp in _MODELS:
        engine = Engine(SHAPES[name], _H100, tp)
        for batch_size in (1, 8, 32, 64, 128, 256, 512):
            speedups = {
                decoding.num_speculative_tokens: _speedup(engine, decoding, batch_size)
                for decoding in layerskip_up_to(exit_layer, 3.0)
            }
            best = max(speedups, key=lambda k: speedups[k])
            shown = [f"{speedups[k]:.2f}" for k in (4, 2, 1)]
            rows.append(
                [name, str(tp), str(batch_size), *shown, str(best), f"{speedups[best]:.2f}"]
            )
    return markdown(header, rows)


def _speedup(engine: Engine, decoding: Decoding, batch_size: int) -> float:
    """A step's speed-up over plain decoding, at a context of 1150 tokens."""
    plain_s = engine.step_s(Decoding("plain"), batch_size, 1150)
    return decoding.acceptance_length * plain_s / engine.step_s(decoding, batch_size, 1150)


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
            rows.append([name, str(tp), f"{limit_ms} ms", *_columns(engine, 1.0, *both)])
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
                factor = num_gpus // tp / (1 + engine.assumptions.headroom)
                rows.append([name, str(num_gpus), *_columns(engine, factor, *both)[:3]])
    return markdown(header, rows)


def _both(
    engine: Engine, exit_layer: int, limit_ms: float
) -> tuple[EnginePlan | None, EnginePlan | None]:
    kind = RequestKind(1000, 300, limit_ms / 1e3)
    return (
        plan_engine(engine, kind, Decoding("plain")),
        best_engine_plan(engine, kind, layerskip_up_to(exit_layer, 3.0)),
    )


def _columns(
    engine: Engine, factor: float, plain: EnginePlan | None, ours: EnginePlan | None
) -> list[str]:
    """Tokens a second times ``factor``, their ratio, batches, K, GPU hours."""

    def each(text: Callable[[EnginePlan], str]) -> list[str]:
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
        engine, kind = Engine(SHAPES[name], _H100, tp), RequestKind(1000, 300, 0.02)
        plain = plan_engine(engine, kind, Decoding("plain"))
        assert plain is not None
        for length in _LENGTHS:
            ours = best_engine_plan(engine, kind, layerskip_up_to(exit_layer, length))
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
            speedups = [_speedup(engine, ours, size) for size in (1, 32)]
            files = measured_files(name, exit_layer, num_drafts, tp)
            rows.append([
                name, str(exit_layer), str(num_drafts), str(tp),
                *(f"{s:.2f}" for s in speedups), ", ".join(files) or "no",
            ])  # fmt: skip
    return markdown(header, rows)


def measured_files(shape: str, exit_layer: int, num_drafts: int, tp: int) -> list[str]:
    """Result files with LayerSkip at this (E, K, TP) on a GPU."""
    wanted = {
        "device": "cuda",
        "shape": shape,
        "exit_layer": exit_layer,
        "num_speculative_tokens": num_drafts,
    }
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        records = json.loads(path.read_text(encoding="utf-8")).get("records", [])
        if any(_is_measured(record, wanted, tp) for record in records):
            found.append(path.name)
    return found


def _is_measured(record: Mapping[str, Any], wanted: Mapping[str, Any], tp: int) -> bool:
    settings = record.get("settings", {})
    return (
        str(record.get("mode", "")).startswith("layerskip")
        and all(settings.get(name) == value for name, value in wanted.items())
        and settings.get("engine_args", {}).get("tensor_parallel_size", 1) == tp
    )


TABLES: Tables = {
    "batch": batch_table,
    "limit": limit_table,
    "fleet": fleet_table,
    "acceptance": acceptance_table,
    "tp": tp_table,
}
