# SPDX-License-Identifier: Apache-2.0
"""docs/results.md says what the committed result files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.pages import write_results
from benchmarks.pages.figures import draw_figures
from benchmarks.pages.tables import with_tables
from benchmarks.prompts.records import load
from benchmarks.prompts.summary import outputs_differ, summarize

ROOT = Path(__file__).parents[3]

FILES = sorted(write_results.PROMPTS.glob("*.json"))


def test_the_pages_tables_are_the_commands():
    page = write_results.PAGE.read_text(encoding="utf-8")
    assert with_tables(page, write_results.TABLES) == page


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
