# SPDX-License-Identifier: Apache-2.0
"""What a GPU session measured, in one page of Markdown, from the files in its results folder.

Limits are those of the session's GPU: with the datasheet's bandwidth if
``vllm_layerskip/measuring/hardware.py`` knows the GPU, otherwise with that of a measured copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.decode import summary as decode_summary
from benchmarks.engines.markdown import markdown
from benchmarks.engines.results import is_result_file, load_records
from benchmarks.gpu.verdict import ROUNDING, describe
from benchmarks.prompts import records as prompt_records
from benchmarks.prompts.summary import label, summarize
from benchmarks.prompts.tables import (
    equal_answers,
    plain_record,
    position_table,
    two_digits,
)
from benchmarks.serve.summary import SERVE_HEADER, is_serve_record, serve_columns

CHECKS = ("exact.json", "bf16.json", "twins-bf16.json")
HEADER = (*decode_summary.HEADER, "tok/s limit")


def summary(results: Path) -> str:
    """The page; it leaves out what the session has not measured (yet)."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Path) -> Iterator[str]:
    yield from _guarded(results / "gpu.json", _gpu)
    bandwidth = _bandwidth(results / "gpu.json")
    for name in CHECKS:
        yield from _guarded(results / name, _check)
    yield from _guarded(results / "real-adapter.json", _adapter)
    for path in (results / f"real-{dtype}.json" for dtype in ROUNDING):
        yield from _guarded(path, _acceptance)
    for path in sorted(results.glob("*.json")):
        yield from _guarded(path, _tables, bandwidth)
    yield from _guarded(results / "session.json", _outcomes)


def _guarded(path: Path, make: Callable[..., Iterator[str]], *args: Any) -> Iterator[str]:
    """What ``make`` yields for a file; for one that cannot be read, a line that says so."""
    if not path.exists():
        return
    try:
        yield from list(make(path, *args))
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path.name} cannot be read: {type(error).__name__}: {error}"


def _gpu(path: Path) -> Iterator[str]:
    gpu = _read(path)
    known, measured = gpu["datasheet_bandwidth_tb_s"], gpu["copy_bandwidth_tb_s"]
    facts = gpu["provenance"]
    name = facts["gpu"]["name"] if facts["gpu"] else facts["cpu"]["model"]
    source = f"{known} TB/s, its datasheet's" if known else f"{measured} TB/s, as measured"
    yield f"{name}: a copy moves {measured} TB/s; limits count with {source}."


def _bandwidth(path: Path) -> float | None:
    """TB/s for the limits; None leaves it to the GPU's name."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        gpu = _read(path)
        return None if gpu["datasheet_bandwidth_tb_s"] else gpu["copy_bandwidth_tb_s"]
    return None


def _check(path: Path) -> Iterator[str]:
    yield describe(_read(path))


def _adapter(path: Path) -> Iterator[str]:
    facts = _read(path)
    scores = facts["adapter"]["scores"]
    before, after = scores["before"], scores["after"]
    yield (
        f"Draft adapter, E = {facts['adapter']['exit_layer']}: {facts['num_steps']} steps, "
        f"{facts['num_trained_tokens'] / 1e6:.1f} M tokens of {facts['num_samples']} samples, "
        f"{facts['seconds']:.0f} s. Predicted acceptance length at "
        f"K = {scores['num_speculative_tokens']}: {before['acceptance_length']:.2f} without it, "
        f"{after['acceptance_length']:.2f} with it; agreement {before['agreement']:.1%} and "
        f"{after['agreement']:.1%}."
    )


def _acceptance(path: Path) -> Iterator[str]:
    records = prompt_records.load(path)
    plain = plain_record(records)
    dtype = plain["settings"]["dtype"]
    body = []
    for record in records:
        result = summarize(record, plain)[-1]
        body.append([
            label(record), str(result.num_answers), two_digits(result.acceptance_length),
            equal_answers(result), f"{record['runs_tokens_per_s'][0]:.0f}",
        ])  # fmt: skip
    header = (f"{dtype}, all questions", "answers", "acceptance length", "equal to plain", "tok/s")
    yield markdown(header, body)
    if len(records) > 1:
        yield position_table(records)


def _outcomes(path: Path) -> Iterator[str]:
    outcomes = (f"{one['name']} {one['status']}" for one in _read(path)["outcomes"])
    yield f"Parts: {'; '.join(outcomes)}."


def _tables(path: Path, bandwidth: float | None) -> Iterator[str]:
    if not is_result_file(path):
        return
    records = load_records(path)
    notes = dict.fromkeys(record["note"] for record in records if "note" in record)
    yield f"**{path.name}.** {' '.join(notes)}".rstrip()
    decode = [record for record in records if not is_serve_record(record)]
    if decode:
        results = decode_summary.decode_results(decode, bandwidth)
        limits = (decode_summary.format_figure(one.tokens_limit, ".0f") for one in results)
        body = zip(map(decode_summary.columns, results), limits, strict=True)
        yield markdown(HEADER, ([*columns, limit] for columns, limit in body))
    serve = [record for record in records if is_serve_record(record)]
    if serve:
        yield markdown(SERVE_HEADER, map(serve_columns, serve))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
