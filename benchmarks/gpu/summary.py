# SPDX-License-Identifier: Apache-2.0
"""What a GPU session came to, in one page of Markdown, out of the files in its results folder.

Limits are those of the very GPU: the datasheet's bandwidth where ``hardware.py`` knows the GPU,
otherwise what a copy measured in the same session.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.decode import summary as summary_table
from benchmarks.decode.report import markdown
from benchmarks.engines.results import is_result_file, load_records
from benchmarks.gpu import check_graphs
from benchmarks.serve.summary import SERVE_HEADER, is_serve_record, serve_cells

CHECKS = ("exact.json", "bf16.json")
HEADER = (*summary_table.HEADER, "tok/s limit")


def summary(results: Path) -> str:
    """The page; what a session has not measured (yet) is left out."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Path) -> Iterator[str]:
    yield from _guarded(results / "gpu.json", _gpu)
    bandwidth = _bandwidth(results / "gpu.json")
    for name in CHECKS:
        yield from _guarded(results / name, _check)
    for path in sorted(results.glob("*.json")):
        yield from _guarded(path, _tables, bandwidth)
    yield from _guarded(results / "session.json", _outcomes)


def _guarded(path: Path, make: Callable[..., Iterator[str]], *args: Any) -> Iterator[str]:
    """What ``make`` yields of a file; of one that cannot be read, a line that says so."""
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
    yield check_graphs.describe(_read(path))


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
        table = summary_table.rows(decode, bandwidth)
        limits = (summary_table.format_figure(row.tokens_limit, ".0f") for row in table)
        body = zip(map(summary_table.cells, table), limits, strict=True)
        yield markdown(HEADER, ([*cells, limit] for cells, limit in body))
    serve = [record for record in records if is_serve_record(record)]
    if serve:
        yield markdown(SERVE_HEADER, map(serve_cells, serve))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
