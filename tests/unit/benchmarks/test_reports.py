# SPDX-License-Identifier: Apache-2.0
"""Reports and plots of result files."""

from __future__ import annotations

from benchmarks.decode.summary import HEADER
from benchmarks.engines import results
from benchmarks.pages import plots, report
from benchmarks.serve.summary import SERVE_HEADER

from .records import decode_record, serve_record


def test_report_names_sources(tmp_path):
    file = tmp_path / "7b.json"
    for record in (decode_record("plain", 1, 300.0), decode_record("layerskip", 1, 600.0)):
        results.add_record(file, record)
    results.add_record(file, serve_record())
    text = report.report(file)
    for part in ("7b.json", "NVIDIA H200", "commit abc", "vllm 0.32.0", "--preset 7b-cnndm"):
        assert part in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    # Header, rule and rows; engines' and serving's tables have as many columns.
    decoding, others = len(HEADER), len(SERVE_HEADER)
    assert (tables.count(decoding + 1), tables.count(others + 1)) == (4, 4 + 3)


def test_report_has_a_twins_memory_and_its_rounds(tmp_path):
    file = tmp_path / "7b.json"
    plain = decode_record("plain", 1, 300.0)
    assert "draft twin MB" not in _report(file, plain)
    twin = decode_record("layerskip", 1, 900.0)
    twin["settings"] = twin["settings"] | {"draft_quantization": "int4", "round": 2}
    twin["engine"] = twin["engine"] | {
        "memory": {"kv_cache_bytes": 10**9, "twin_bytes": 934 * 10**6}
    }
    text = _report(file, twin)
    assert "| draft twin MB |" in text
    assert "| 934.00 |" in text
    assert "E=8 K=12 int4" in text
    assert "medians over 2 rounds A B A B" in text


def _report(file, record):
    results.add_record(file, record)
    return report.report(file)


def test_plots_are_written_and_repeatable(tmp_path):
    file = tmp_path / "7b.json"
    for size in (1, 4):
        for record in (
            decode_record("plain", size, 300.0),
            decode_record("layerskip", size, 600.0),
        ):
            results.add_record(file, record)
    first = plots.plot_file(file, tmp_path / "a")
    second = plots.plot_file(file, tmp_path / "b")
    assert sorted(path.name for path in first) == [
        f"7b-llama-2-7b-{kind}{suffix}"
        for kind in ("speedup", "tokens")
        for suffix in (".png", ".svg")
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
