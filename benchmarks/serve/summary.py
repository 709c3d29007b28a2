# SPDX-License-Identifier: Apache-2.0
"""The texts of a serving table, from the records of ``benchmarks.serve.bench``."""

from __future__ import annotations

from benchmarks.engines.results import Record

SERVE_HEADER = (
    "mode", "concurrency", "requests", "output tok/s", "TPOT ms (median)", "TPOT ms (p99)",
    "TTFT ms (median)", "TTFT ms (p99)", "acceptance",
)  # fmt: skip


def is_serve_record(record: Record) -> bool:
    return record["kind"] == "serve"


def serve_columns(record: Record) -> list[str]:
    """A record's texts under ``SERVE_HEADER``; one that was not measured says why."""
    start = [record["mode"], str(record.get("concurrency", ""))]
    if record["status"] != "ok":
        reason = f"{record['status']}: {record.get('reason', '')}"
        return [*start, reason, *[""] * (len(SERVE_HEADER) - len(start) - 1)]
    result = record["result"]
    acceptance = result.get("spec_decode_acceptance_length")
    return [
        *start,
        str(result["completed"]),
        f"{result['output_throughput']:.1f}",
        f"{result['median_tpot_ms']:.2f}",
        f"{result['p99_tpot_ms']:.2f}",
        f"{result['median_ttft_ms']:.1f}",
        f"{result['p99_ttft_ms']:.1f}",
        "" if acceptance is None else f"{acceptance:.2f}",
    ]
