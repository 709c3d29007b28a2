# SPDX-License-Identifier: Apache-2.0
"""docs/results.md says what the committed result files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.decode.summary import decode_results
from benchmarks.engines.results import load_records
from benchmarks.pages import write_gpu, write_results
from benchmarks.pages.figures import draw_figures
from benchmarks.pages.tables import with_tables
from benchmarks.prompts.records import load
from benchmarks.prompts.summary import outputs_differ, summarize

ROOT = Path(__file__).parents[3]

FILES = sorted(write_results.PROMPTS.glob("*.json"))


@pytest.mark.parametrize("module", [write_results, write_gpu], ids=lambda module: module.__name__)
def test_the_pages_tables_are_the_commands(module):
    page = module.PAGE.read_text(encoding="utf-8")
    assert with_tables(page, module.TABLES) == page


@pytest.mark.parametrize("name", ["README.md", "docs/gpu.md", "docs/benchmarks.md"])
def test_what_pages_say_of_the_first_gpu_run_is_in_its_files(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    records = decode_results(load_records(write_gpu.FIRST_RUN / "first-7b.json"))
    found = {(one.mode, one.record["batch_size"]): one for one in records}
    for mode in ("plain", "layerskip"):
        assert f"{found[mode, 1].tokens_per_s:.1f}" in page
    for batch_size in (1, 32):
        assert f"{found['layerskip', batch_size].speedup:.2f}" in page
    if name == "docs/gpu.md":  # The demo's table too.
        demo = (write_gpu.FIRST_RUN / "demo.txt").read_text(encoding="utf-8")
        for line in demo.splitlines():
            cells = [cell.strip() for cell in line.split("│")]
            if len(cells) > 3:
                module, equal, length, speeds = cells[1], cells[2], cells[3], cells[6:8]
                row = [module.rstrip("…").removesuffix(".py"), equal.lower(), length, *speeds]
                assert f"| {' | '.join(row)} |" in page


@pytest.mark.parametrize("name", ["README.md", "docs/draft-twins.md", "CHANGELOG.md"])
def test_what_pages_say_of_twins_on_a_cpu_is_in_its_file(name):
    """Every speed-up in a sentence or row on it, and the floor that the twins were built for."""
    page = (ROOT / name).read_text(encoding="utf-8")
    results = decode_results(load_records(write_results.RESULTS / "twins-cpu-7b.json"))
    found = {(one.setting, one.record["batch_size"]): one for one in results}
    int4, every_layer = found["E=8 K=12 int4", 1], found["E=L K=4 int4", 1]
    assert min(int4.speedups) >= 3.0
    assert min(every_layer.speedups) >= 1.6
    named = [int4, found["E=8 K=12", 1]]
    if name == "README.md":
        named += [found["E=8 K=12 int8", 1], every_layer]
    if name == "docs/draft-twins.md":
        named = [one for one in results if one.mode != "plain"]
        for one in named:
            rounds = ", ".join(f"{speedup:.2f}" for speedup in sorted(one.speedups))
            assert f"{one.speedup:.2f} ({rounds}) | {one.speedup_limit:.2f}" in page
    for one in named:
        assert f"{one.speedup:.2f}" in page


@pytest.mark.parametrize(
    "path",
    sorted(write_gpu.RESULTS.rglob("*.*")),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_a_gpus_files_name_no_place_of_its_machine(path):
    text = path.read_text(encoding="utf-8")
    assert "/tmp/" not in text
    assert "/home/" not in text
    assert "pid=" not in text


def test_the_figures_are_the_commands(tmp_path):
    for path in draw_figures(write_results.PROMPTS, tmp_path):
        committed = write_results.FIGURES / path.name
        assert path.read_bytes() == committed.read_bytes(), path.name
        assert f"figures/{path.name})" in write_results.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_committed_run_is_whole_clean_and_exact(path):
    records = load(path)
    plain = next(record for record in records if record["mode"] == "plain")
    assert {record["provenance"]["commit"]["id"] for record in records} != {None}
    for record in records:
        assert record["provenance"]["commit"]["dirty"] is False
        assert record["settings"]["dtype"] == "float32"
        assert len(record["runs_tokens_per_s"]) == record["settings"]["repeats"] >= 3
        assert record["questions"] == plain["questions"]
        # In float32 every mode writes plain decoding's tokens, in every run.
        assert not outputs_differ(record, plain)
        assert all(answer["same_in_every_run"] for answer in record["answers"])
        if record["mode"] != "plain":
            assert summarize(record, plain)[-1].acceptance_length > 1
        text = json.dumps(record)
        assert "/tmp/" not in text
        assert str(ROOT) not in text


@pytest.mark.parametrize(("last", "is_steady"), [(8.5, True), (6.0, False)])
def test_a_categorys_speed_up_is_shown_only_where_runs_agree(
    tmp_path, monkeypatch, last, is_steady
):
    content = json.loads(FILES[0].read_text())
    for record in content["records"]:
        record["runs_tokens_per_s"] = [9.0, 9.5, 9.2]
    content["records"][-1]["runs_tokens_per_s"] = [8.0, 8.2, last]
    (tmp_path / "one.json").write_text(json.dumps(content))
    monkeypatch.setattr(write_results, "PROMPTS", tmp_path)
    table = write_results._prompts_table("one")()
    assert f"| {min(8.0, last) / 9.5:.2f} to {max(8.2, last) / 9.0:.2f} |" in table
    assert ("speed-up, E = 3" in table) == is_steady
    assert ("no speed-up is given by category" in table) != is_steady


def test_every_committed_run_is_on_the_page():
    page = write_results.PAGE.read_text(encoding="utf-8")
    assert FILES
    for path in FILES:
        assert f"`{path.relative_to(ROOT)}`" in page
