# SPDX-License-Identifier: Apache-2.0
"""The figures of a table: speed-up over plain decoding, its limit, and what share was reached."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.engines.results import Record
from vllm_layerskip.measuring.hardware import find_gpu
from vllm_layerskip.measuring.roofline import BYTES_ONLY, Decoding, Roofline, scheduled_drafts
from vllm_layerskip.measuring.shapes import Shape
from vllm_layerskip.twins.kinds import NONE

_SPECULATION = (
    "exit_layer",
    "draft_quantization",
    "num_speculative_tokens",
    "synthetic_acceptance_length",
    "draft_vocab",
    "schedule",
)
"""Settings that plain decoding does not depend on."""

_REASON_CHARS = 50
"""Of a reason in a table; the file has the whole."""


@dataclass(frozen=True)
class DecodeResult:
    """The figures of one record, a row of the table; figures that do not exist are None."""

    record: Record
    tokens_per_s: float | None = None
    spread: float | None = None
    """(max - min) / median of the runs' tokens/s."""
    step_ms: float | None = None
    acceptance_length: float | None = None
    """By vLLM's counters, over whole runs."""
    speedup: float | None = None
    speedup_limit: float | None = None
    tokens_limit: float | None = None
    reused: str = ""
    speedups: tuple[float, ...] = ()
    """One for each round, if there were several; ``speedup`` is their median."""

    @property
    def speedup_reached(self) -> float | None:
        return _ratio(self.speedup, self.speedup_limit)

    @property
    def tokens_reached(self) -> float | None:
        return _ratio(self.tokens_per_s, self.tokens_limit)

    @property
    def mode(self) -> str:
        return self.record["mode"]

    @property
    def setting(self) -> str:
        """E, K and what else the mode was given."""
        settings = self.record["settings"]
        if self.mode in ("plain", "transformers"):
            return ""
        parts = [f"E={self._exit_layer}"] if self.mode != "ngram" else []
        if self.mode != "early-exit":
            parts.append(f"K={settings['num_speculative_tokens']}")
        if self.twin != NONE:
            parts.append(self.twin)
        if settings["draft_vocab"] and self.mode.startswith("layerskip"):
            parts.append(f"vocab {self.record.get('num_draft_vocab_ids')}")
        if settings["schedule"]:
            parts.append("schedule")
        return " ".join(parts)

    @property
    def twin(self) -> str:
        """The kind of the draft twin."""
        settings = self.record["settings"]
        return settings.get("draft_quantization", NONE) if self.mode == "layerskip" else NONE

    @property
    def _exit_layer(self) -> str:
        layers: int = self.record["settings"]["exit_layer"]
        shape = self.record.get("model_shape")  # Of an engine that did not start it is not known.
        return "L" if shape and layers == shape["num_layers"] else str(layers)


def model_name(record: Record) -> str:
    """The shape's name, or the checkpoint folder's."""
    settings = record["settings"]
    return settings["shape"] or Path(settings["model"]).name


def gpu_name(record: Record) -> str | None:
    gpu = record["provenance"]["gpu"]
    return gpu["name"] if gpu and record["settings"]["device"] == "cuda" else None


def baseline_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What plain decoding depends on."""
    return {name: value for name, value in settings.items() if name not in _SPECULATION}


def decode_results(records: Iterable[Record], bandwidth: float | None = None) -> list[DecodeResult]:
    """One result for each cell, in the order of prompt length, batch size and measuring.

    What was measured in several rounds is one result, of medians over the rounds.

    Args:
        bandwidth: of the GPU, in TB/s; None takes the datasheet's.
    """
    records = list(records)
    plain = {_baseline_key(r): r for r in records if r["mode"] == "plain" and r["status"] == "ok"}
    ordered = sorted(records, key=lambda r: (r.get("prompt_len") or 0, r.get("batch_size") or 0))
    results = (_result(record, plain.get(_baseline_key(record)), bandwidth) for record in ordered)
    cells: dict[str, list[DecodeResult]] = {}
    for result in results:
        cells.setdefault(_cell_of_rounds(result.record), []).append(result)
    return [_merged(rounds) for rounds in cells.values()]


def _cell_of_rounds(record: Record) -> str:
    settings = {name: value for name, value in record["settings"].items() if name != "round"}
    cell = record.get("prompt_len"), record.get("batch_size")
    reason = None if record["status"] == "ok" else (record["status"], record.get("reason"))
    return repr((record["mode"], settings, gpu_name(record), *cell, reason))


def _merged(rounds: Sequence[DecodeResult]) -> DecodeResult:
    """Medians over the rounds of one cell."""
    first = rounds[0]
    if len(rounds) == 1 or first.tokens_per_s is None:
        return first

    def median(name: str) -> float | None:
        values = [value for one in rounds if (value := getattr(one, name)) is not None]
        return statistics.median(values) if values else None

    runs = [run["tokens_per_s"] for one in rounds for run in one.record["runs"]]
    return replace(
        first,
        tokens_per_s=median("tokens_per_s"),
        step_ms=median("step_ms"),
        acceptance_length=median("acceptance_length"),
        speedup=median("speedup"),
        speedup_limit=median("speedup_limit"),
        tokens_limit=median("tokens_limit"),
        spread=(max(runs) - min(runs)) / statistics.median(runs),
        speedups=tuple(one.speedup for one in rounds if one.speedup is not None),
    )


def describe(record: Record) -> str:
    """A record in one line."""
    if record["status"] != "ok":
        reason = record.get("reason", "")
        cell = f"batch {record['batch_size']}: " if "batch_size" in record else ""
        return f"{cell}{record['status']} ({reason})"
    return (
        f"prompt {record['prompt_len']}, batch {record['batch_size']}: "
        f"{record['tokens_per_s']:.1f} tokens/s, step {record['step_ms']:.3f} ms"
    )


HEADER = (
    "prompt", "batch", "mode", "setting", "tok/s", "spread", "of roofline",
    "x plain", "limit", "of limit", "acceptance", "step ms", "reused / steps",
)  # fmt: skip


def columns(result: DecodeResult) -> list[str]:
    """A result's texts under ``HEADER``; one that was not measured says why."""
    record = result.record
    start = [str(record.get("prompt_len", "")), str(record.get("batch_size", ""))]
    start += [result.mode, result.setting]
    if record["status"] != "ok":
        reason = f"{record['status']}: {record.get('reason', '')}"
        reason = textwrap.shorten(reason, _REASON_CHARS, placeholder=" ...")
        return [*start, reason, *[""] * (len(HEADER) - len(start) - 1)]
    return [
        *start,
        format_figure(result.tokens_per_s, ".1f"),
        format_figure(result.spread, ".1%"),
        format_figure(result.tokens_reached, ".0%"),
        _speedup(result),
        format_figure(result.speedup_limit, ".2f"),
        format_figure(result.speedup_reached, ".0%"),
        format_figure(result.acceptance_length, ".2f"),
        format_figure(result.step_ms, ".3f"),
        result.reused,
    ]


def _speedup(result: DecodeResult) -> str:
    """With several rounds, their median and range; of plain decoding it is 1 in each.

    A range with 1 in it shows no difference, whatever the median says.
    """
    text = format_figure(result.speedup, ".2f")
    if len(result.speedups) < 2 or result.mode == "plain":
        return text
    low, high = min(result.speedups), max(result.speedups)
    no_difference = ", no difference" if low <= 1 <= high else ""
    return f"{text} ({low:.2f} to {high:.2f}{no_difference})"


def rich_table(results: Sequence[DecodeResult]) -> Table:
    table = Table(title="Steady decoding")
    for column in HEADER:
        table.add_column(column, justify="left" if column in ("mode", "setting") else "right")
    for result in results:
        table.add_row(*map(escape, columns(result)))
    return table


def _result(record: Record, plain: Record | None, bandwidth: float | None) -> DecodeResult:
    if record["status"] != "ok":
        return DecodeResult(record)
    speeds = [run["tokens_per_s"] for run in record["runs"]]
    speculation = record["speculation"] or {}
    speed = record["tokens_per_s"]
    speedup_limit, tokens_limit = _limits(record, bandwidth)
    return DecodeResult(
        record,
        tokens_per_s=speed,
        spread=(max(speeds) - min(speeds)) / speed,
        step_ms=record["step_ms"],
        acceptance_length=speculation.get("acceptance_length"),
        speedup=_ratio(speed, plain["tokens_per_s"] if plain else None),
        speedup_limit=speedup_limit,
        tokens_limit=tokens_limit,
        reused=_reused(speculation),
    )


def _limits(record: Record, bandwidth: float | None) -> tuple[float | None, float | None]:
    """Bounds of the speed-up and, on a known GPU, of tokens/s."""
    settings, batch_size = record["settings"], record["batch_size"]
    if record["mode"].startswith("transformers"):
        return None, None
    gpu = find_gpu(gpu_name(record), bandwidth)
    roofline = Roofline(Shape(**record["model_shape"]), gpu or BYTES_ONLY, settings["dtype"])
    decoding = _decoding(record)
    # The mean over the window: half of what is generated is in the cache.
    batch = (batch_size, record["prompt_len"] + settings["output_len"] / 2)
    speedup = roofline.speedup(decoding, *batch) if record["mode"] != "plain" else None
    return speedup, roofline.tokens_per_s(decoding, *batch) if gpu else None


def _decoding(record: Record) -> Decoding:
    settings, mode = record["settings"], record["mode"]
    if mode in ("plain", "early-exit"):
        return Decoding(mode, exit_layer=settings["exit_layer"])
    num_drafts = scheduled_drafts(
        settings["schedule"], settings["num_speculative_tokens"], record["batch_size"]
    )
    return Decoding(
        mode,
        exit_layer=settings["exit_layer"],
        num_speculative_tokens=num_drafts,
        acceptance_length=_tokens_per_step(record),
        draft_vocab=record.get("num_draft_vocab_ids") if mode.startswith("layerskip") else None,
        draft_quantization=DecodeResult(record).twin,
    )


def _tokens_per_step(record: Record) -> float:
    """Tokens a request and step, in the windows that were timed."""
    num_tokens, num_steps = (
        sum(run[name] for run in record["runs"]) for name in ("num_tokens", "num_steps")
    )
    return num_tokens / num_steps / record["batch_size"]


def _baseline_key(record: Record) -> tuple[Any, ...]:
    settings = baseline_settings(record["settings"])
    gpu = gpu_name(record)
    return repr(settings), gpu, record.get("prompt_len"), record.get("batch_size")


def _reused(speculation: Record) -> str:
    if "num_verify_steps_reused" not in speculation:
        return ""
    reused = speculation["num_verify_steps_reused"]
    return f"{reused} / {reused + speculation['num_verify_steps_full']}"


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value and of and math.isfinite(of) else None


def format_figure(value: float | None, spec: str) -> str:
    """A figure's text; empty if it does not exist."""
    return "" if value is None else format(value, spec)
