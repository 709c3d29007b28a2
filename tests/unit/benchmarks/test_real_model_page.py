# SPDX-License-Identifier: Apache-2.0
"""The part of docs/results.md about a real model, made of its result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.pages import write_results
from benchmarks.pages.figures import draw_real_model
from benchmarks.pages.real_files import read_real_files
from benchmarks.pages.real_model import APPENDIX, arranged, file_tables, real_tables
from benchmarks.pages.tables import with_tables
from benchmarks.prompts.records import load, save
from benchmarks.prompts.summary import outputs_differ, summarize
from vllm_layerskip.errors import UserError

from .records import real_model_records

ROOT = Path(__file__).parents[3]
COMMITTED = sorted(write_results.REAL_MODEL.glob("*.json"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "real-model"
    save(folder / "spec-bench-float32.json", real_model_records("float32", batch_size=8))
    save(folder / "spec-bench-bfloat16-b1.json", real_model_records(equal=False))
    save(folder / "word-problems-float32.json", real_model_records("float32"))
    save(folder / "functions-bfloat16-b1-t0.7.json", real_model_records(temperature=0.7))
    return folder


def only_file(folder, name, records):
    save(folder / "one" / f"{name}.json", records)
    (file,) = read_real_files(folder / "one")
    return file


class TestNames:
    def test_the_order_of_the_page(self, folder):
        files = read_real_files(folder)
        assert [file.heading for file in files] == [
            "Spec-Bench, float32",
            "Spec-Bench, bfloat16, one at a time",
            "Word problems, float32",
            "Functions, bfloat16, one at a time, temperature 0.7",
        ]
        assert files[-1].table == "real-functions-bfloat16-b1-t0_7"
        assert {file.model for file in files} == {"Small-1B-Instruct"}

    def test_no_folder_has_none(self, tmp_path):
        assert read_real_files(tmp_path / "none") == []

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("spec-bench", "must be WORKLOAD-DTYPE"),
            ("spec-bench-int8", "a dtype of float32, bfloat16, float16. Rename it"),
            ("qa-bfloat16", "with a workload of spec-bench, functions, word-problems"),
            ("spec-bench-float32", "has dtype bfloat16, batch size 1 and temperature 0, not what"),
            ("spec-bench-bfloat16-b4", "batch size 1 and temperature 0, not what the name says"),
            ("spec-bench-bfloat16-t0.7", "temperature 0, not what the name says. Rename it"),
        ],
    )
    def test_a_name_that_says_something_else_is_refused(self, tmp_path, name, error):
        save(tmp_path / f"{name}.json", real_model_records())
        with pytest.raises(UserError, match=re.escape(error)):
            read_real_files(tmp_path)

    def test_two_models_are_refused(self, folder):
        other = real_model_records()
        for record in other:
            record["settings"]["model"] = "build/Other"
        save(folder / "functions-bfloat16.json", other)
        with pytest.raises(UserError, match="have the models Other, Small-1B-Instruct"):
            read_real_files(folder)


class TestTables:
    def test_speed_acceptance_and_equality_by_category(self, tmp_path):
        text = file_tables(
            only_file(tmp_path, "spec-bench-bfloat16-b1", real_model_records(equal=False))
        )
        assert "| plain |  | 47.7 (45.5 to 50.0) |  |  | 4 of 4 |" in text
        # Steps of 20 for 40 tokens; twice as fast, and any two runs differ by a tenth.
        assert "| layerskip, early | 2.00 | 95.5 (90.9 to 100.0) | 2.00 (1.82 to 2.20) |" in text
        assert (
            "| category | questions | answers | early | int4 | draft-model, E = 8, K = 4 |" in text
        )
        assert "| writing | 2 | 2 | 2.00 | 3.08 | 4.00 |" in text
        assert "| math | 2 | 2 | 47.7 (45.5 to 50.0) | 2.00 (1.82 to 2.20) |" in text
        assert "| writing | 2 | 2 | 0 of 2 | 0 of 2 | 0 of 2 |" in text
        assert "| math | 2 | 2 | 2 of 2 | 2 of 2 | 2 of 2 |" in text
        assert "| mode | draft 1 | draft 2 |" in text
        assert '* *early*: `{"exit_layer": 8, "num_speculative_tokens": 4}`' in text
        assert "8 of 8 answers were" not in text
        assert "16 of 16 answers were the same in every run" in text
        assert "Again: `python -m benchmarks.prompts.real_prompts --dtype bfloat16`" in text

    def test_float32_shows_equality_and_no_speed(self, tmp_path):
        records = real_model_records("float32", batch_size=8, repeats=1)
        text = file_tables(only_file(tmp_path, "spec-bench-float32", records))
        assert "All 4 answers of every mode equal plain decoding's." in text
        assert "tokens/s" not in text
        assert "x plain" not in text
        assert "one run after a warm-up" in text
        assert "same in every run" not in text

    def test_requests_at_once_have_no_speed_by_category(self, tmp_path):
        records = real_model_records(batch_size=8)
        text = file_tables(only_file(tmp_path, "spec-bench-bfloat16-b8", records))
        assert "Speed of decoding" not in text
        assert "| layerskip, early | 2.00 | 22.0 (20.0 to 24.0) | 2.00 (1.67 to 2.40) |  |" in text

    def test_sampled_answers_are_not_compared(self, tmp_path):
        records = real_model_records(temperature=0.7, equal=False)
        text = file_tables(only_file(tmp_path, "spec-bench-bfloat16-b1-t0.7", records))
        assert "equal" not in text
        assert "temperature 0.7" in text
        assert "2.00 (1.82 to 2.20)" in text


class TestPage:
    PAGE = write_results.PAGE.read_text(encoding="utf-8")

    def written(self, page, folder):
        of_others = {
            name: table for name, table in write_results.TABLES.items()
            if not name.startswith("real-")
        }  # fmt: skip
        tables = of_others | {name: lambda: "its table" for name in real_tables(folder)}
        return with_tables(arranged(page, folder), tables)

    @pytest.fixture
    def page(self):
        """A page without a real model, with every table of the committed one."""
        names = [name for name in write_results.TABLES if not name.startswith("real-")]
        places = {
            "The checkpoint": names[:1],
            "Functions that the model never saw": names[1:3],
            "Spec-Bench": names[3:4],
            "Choosing E and K": names[4:5],
            "Shapes on a CPU": names[5:-1],
            "Model Runner V2 on a CPU": names[-1:],
        }
        sections = [
            f"## {heading}\n\n### More\n\n"
            + "".join(f"<!-- table: {name} -->\nold\n<!-- end of table -->\n\n" for name in of)
            for heading, of in places.items()
        ]
        return "# Results\n\nIntro.\n\n" + "".join(sections).rstrip("\n") + "\n"

    def test_without_a_file_it_stays_as_it_is(self, tmp_path):
        assert arranged(self.PAGE, tmp_path / "none") == self.PAGE
        assert real_tables(tmp_path) == {}
        assert draw_real_model(tmp_path, tmp_path) == []

    def test_the_model_comes_first_and_the_checkpoint_last(self, page, folder):
        made = self.written(page, folder)
        assert re.findall(r"(?m)^##? .*", made) == [
            "# Results",
            "## Small-1B-Instruct",
            "## Shapes on a CPU",
            "## Model Runner V2 on a CPU",
            APPENDIX,
        ]
        appendix = made.partition(APPENDIX)[2]
        assert re.findall(r"(?m)^#+ .*", appendix) == [
            "### The checkpoint", "#### More",
            "### Functions that the model never saw", "#### More",
            "### Spec-Bench", "#### More",
            "### Choosing E and K", "#### More",
        ]  # fmt: skip
        section = made.partition("## Shapes on a CPU")[0]
        assert section.count("its table") == 4
        assert "### Functions, bfloat16, one at a time, temperature 0.7\n" in section
        assert "(figures/real-model.svg)" in section
        assert made.endswith("\n")
        assert "\n\n\n" not in made

    def test_it_is_written_again_the_same_and_a_new_file_gets_a_place(self, page, folder):
        made = self.written(page, folder)
        assert self.written(made, folder) == made
        save(folder / "functions-float32.json", real_model_records("float32"))
        more = self.written(made, folder)
        assert more.count("### Functions, float32\n") == 1
        assert more.index("### Functions, float32") < more.index("## Shapes on a CPU")
        assert more.replace(
            "### Functions, float32\n\n<!-- table: real-functions-float32 -->\nits table\n"
            "<!-- end of table -->\n\n", "",
        ) == made  # fmt: skip


class TestFigure:
    def test_two_panels_and_the_same_bytes_again(self, folder, tmp_path):
        (first,), (second,) = (draw_real_model(folder, tmp_path / name) for name in "ab")
        assert first.read_bytes() == second.read_bytes()
        text = first.read_text()
        for part in ("writing", "math", "Spec-Bench", "Word problems", "early", "int4",
                     "draft-model, E = 8, K = 4", "acceptance length", "any two runs"):  # fmt: skip
            assert f"{part}" in text, part
        assert "dc:date" not in text
        assert not [line for line in text.splitlines() if line != line.rstrip()]

    def test_one_panel_without_speeds(self, tmp_path):
        save(tmp_path / "functions-float32.json", real_model_records("float32"))
        (path,) = draw_real_model(tmp_path, tmp_path)
        assert "any two runs" not in path.read_text()


def test_the_committed_figure_is_the_commands(tmp_path):
    for path in draw_real_model(write_results.REAL_MODEL, tmp_path):
        assert path.read_bytes() == (write_results.FIGURES / path.name).read_bytes()
        assert f"figures/{path.name})" in write_results.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_run_is_whole_clean_small_and_in_float32_exact(path):
    records = load(path)
    plain = next(record for record in records if record["mode"] == "plain")
    assert path.stat().st_size < 150_000
    assert f"`{path.relative_to(ROOT)}`" in write_results.PAGE.read_text(encoding="utf-8")
    for record in records:
        assert record["provenance"]["commit"]["dirty"] is False
        assert record["questions"] == plain["questions"]
        if record["mode"] != "plain":
            assert summarize(record, plain)[-1].acceptance_length > 1
        if record["settings"]["dtype"] == "float32" and not record["sampling"]["temperature"]:
            assert not outputs_differ(record, plain)
        text = json.dumps(record)
        assert "/tmp" not in text
        assert str(ROOT) not in text
