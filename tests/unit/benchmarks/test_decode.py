# SPDX-License-Identifier: Apache-2.0
"""Modes side by side: limits, prompts, the table's figures, its processes."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.decode import compare, limits, prompts, running, summary
from benchmarks.decode.processes import ModeProcess, in_rounds
from benchmarks.engines import results
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.errors import UserError

from .records import decode_record, parse_settings, tiny_settings

ROOT = Path(__file__).parents[3]
EMBEDDED = embedded_checkpoint()


def test_limits_of_a_twin():
    """By bytes at batch 1, of 13.2 GB a pass: 4.94 with int4 drafts, 1.8 for a stock model."""
    eight = parse_settings("--preset", "7b-cnndm", "--draft-quantization", "int4")
    every = parse_settings(
        *("--preset", "7b-cnndm", "--exit-layer", "all", "--draft-quantization", "int4"),
        *("--num-speculative-tokens", "4", "--synthetic-acceptance-length", "3.8"),
    )
    tables = [limits.limits(settings, "NVIDIA H200") for settings in (eight, every)]
    assert [table.splitlines()[2].split(" | ")[3] for table in tables] == ["4.94", "1.80"]


def test_limits_before_anything_is_run():
    """The draft vocabulary lifts the 8B shape's limit at batch 1 from 1.72 to 1.95."""
    tables = [
        limits.limits(parse_settings("--preset", name), "NVIDIA H200")
        for name in ("8b", "8b-vocab32k")
    ]
    assert [table.splitlines()[2].split(" | ")[3] for table in tables] == ["1.72", "1.95"]
    schedule = parse_settings("--preset", "7b-cnndm", "--schedule", "[[1, 8, 12], [9, 32, 0]]")
    last = limits.limits(schedule, "NVIDIA H200").splitlines()[-1]
    assert last.split(" | ")[1:6:2] == ["32", "1.00", "1.00"]


class TestPrompts:
    def test_random_prompts_are_the_same_every_time(self):
        first, again = (
            prompts.make_prompts("random", 3, 20, 100, Path("unused")) for _ in range(2)
        )
        assert first == again
        assert [len(ids) for ids in first] == [20] * 3
        assert all(3 <= token < 100 for ids in first for token in ids)

    def test_held_out_python(self):
        made = prompts.make_prompts("python", 4, 50, 1024, EMBEDDED)
        assert [len(ids) for ids in made] == [50] * 4
        assert len({tuple(ids) for ids in made}) == 4
        assert {ids[0] for ids in made} == {0}

    def test_a_file_in_spec_benchs_form(self, tmp_path):
        file = tmp_path / "questions.jsonl"
        turns = ["def main(): " * 20, "second turn"]
        file.write_text("\n".join([json.dumps({"turns": turns}), json.dumps({"prompt": "x = 1"})]))
        (ids,) = prompts.make_prompts(str(file), 1, 16, 1024, EMBEDDED)
        assert len(ids) == 16
        with pytest.raises(UserError, match="has 1 texts of 16 tokens; 2 are needed"):
            prompts.make_prompts(str(file), 2, 16, 1024, EMBEDDED)


class TestTable:
    def test_speedup_and_what_was_reached_of_the_limit(self):
        plain, ours = summary.decode_results(
            [decode_record("plain", 1, 300.0), decode_record("layerskip", 1, 600.0)]
        )
        assert (plain.speedup, ours.speedup) == (1.0, 2.0)
        # A little below the 2.22 of an empty KV cache.
        assert 2.19 < ours.speedup_limit < 2.22
        assert ours.speedup_reached == pytest.approx(2.0 / ours.speedup_limit)
        assert plain.tokens_reached == pytest.approx(300 / 359, rel=0.01)
        assert ours.reused == "9 / 10"

    def test_plain_decoding_is_everyones_baseline(self):
        """It depends on no speculation setting, and on batch size and prompt length."""
        other = decode_record("layerskip", 1, 450.0)
        other["settings"] = other["settings"] | {
            "num_speculative_tokens": 6,
            "schedule": [[1, 1, 6]],
        }
        larger = decode_record("layerskip", 4, 450.0)
        by_record = summary.decode_results([decode_record("plain", 1, 300.0), other, larger])
        assert [result.speedup for result in by_record] == [1.0, 1.5, None]

    def test_a_twin_has_its_name_and_its_limit(self):
        record = decode_record("layerskip", 1, 600.0)
        record["settings"] = record["settings"] | {"draft_quantization": "int4"}
        every_layer = {**record, "settings": record["settings"] | {"exit_layer": 32}}
        plain = decode_record("plain", 1, 300.0)
        _, twin, all_layers = summary.decode_results([plain, record, every_layer])
        assert (twin.setting, all_layers.setting) == ("E=8 K=12 int4", "E=L K=12 int4")
        assert 4.8 < twin.speedup_limit < 5.0
        assert twin.speedup == 2.0

    def test_a_round_is_compared_with_its_own_plain_decoding(self):
        """A machine that slows down to a third meanwhile changes no speed-up."""
        records = []
        for number, factor in ((1, 1.0), (2, 0.5), (3, 0.3)):
            for mode, speed in (("plain", 300.0), ("layerskip", 600.0 + 30 * number)):
                record = decode_record(mode, 1, speed * factor)
                record["settings"] = record["settings"] | {"round": number}
                records.append(record)
        plain, ours = summary.decode_results(records)
        assert (plain.tokens_per_s, plain.speedup) == (150.0, 1.0)
        assert ours.speedups == pytest.approx((2.1, 2.2, 2.3))
        assert ours.speedup == pytest.approx(2.2)
        assert summary.columns(ours)[7] == "2.20 (2.10 to 2.30)"
        assert summary.columns(plain)[7] == "1.00"

    @pytest.mark.parametrize(
        ("speeds", "text"),
        [
            ((594.0, 606.0), "1.00 (0.99 to 1.01, no difference)"),
            ((600.0, 660.0), "1.05 (1.00 to 1.10, no difference)"),
            ((606.0, 660.0), "1.06 (1.01 to 1.10)"),
            ((540.0, 594.0), "0.95 (0.90 to 0.99)"),
        ],
    )
    def test_a_range_with_1_in_it_is_no_difference(self, speeds, text):
        records = []
        for number, speed in enumerate(speeds, start=1):
            for mode, tokens_per_s in (("plain", 600.0), ("layerskip", speed)):
                record = decode_record(mode, 1, tokens_per_s)
                record["settings"] = record["settings"] | {"round": number}
                records.append(record)
        assert summary.columns(summary.decode_results(records)[1])[7] == text

    def test_a_round_that_failed_says_so(self):
        records = []
        for number, status in ((1, "ok"), (2, "error"), (3, "ok")):
            record = decode_record("plain", 1, 300.0, status=status, reason="exit status 1")
            record["settings"] = record["settings"] | {"round": number}
            records.append(record)
        ok, failed = summary.decode_results(records)
        assert ok.tokens_per_s == 300.0
        assert "error: exit status 1" in summary.columns(failed)

    def test_what_was_not_measured_says_why(self):
        missing = {"status": "no-room", "reason": "90 KV slots of 50"}
        (result,) = summary.decode_results([decode_record("plain", 128, 1.0, **missing)])
        columns = summary.columns(result)
        assert "no-room: 90 KV slots of 50" in columns
        assert len(columns) == len(summary.HEADER)


class TestCompare:
    """Its processes, with a stand-in for benchmarks.decode.measure."""

    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        def run(body: str, time_limit: float | None = None) -> list[results.Record]:
            script = tmp_path / "measure.py"
            script.write_text("import sys, time\n" + body)
            monkeypatch.setattr(running, "MEASURE", (str(script),))
            monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            monkeypatch.setattr(running, "STOP_MARGIN_S", 0.5)
            output = tmp_path / "results.json"
            deadline = None if time_limit is None else time.monotonic() + time_limit
            one = ModeProcess("plain", tiny_settings())
            options = running.RunOptions(deadline)
            running.run_mode(one, output, tmp_path / "plain.log", options)
            return results.load_records(output)

        return run

    ADD = """
from pathlib import Path
from benchmarks.engines.results import add_record
settings = {"shape": None, "model": "x", "device": "cpu"}
record = {"kind": "decode", "mode": "plain", "settings": settings, "status": "ok",
          "prompt_len": 1, "batch_size": 1, "tokens_per_s": 1.0, "step_ms": 1.0}
add_record(Path(sys.argv[sys.argv.index("--output") + 1]), record)
"""

    @pytest.mark.parametrize(
        ("end", "why"),
        [
            ("sys.exit('no GPU')", "exit status 1: no GPU"),
            ("print('a'); raise ValueError('no GPU')", "exit status 1: ValueError: no GPU"),
            ("sys.exit(3)", "exit status 3; it wrote nothing"),
            (
                "print('ValueError: of a warning', flush=True)\nimport os; os.kill(os.getpid(), 9)",
                "killed by SIGKILL",
            ),
        ],
    )
    def test_a_failed_mode_leaves_its_error_and_what_it_measured(
        self, run, end, why, tmp_path, capsys
    ):
        records = run(self.ADD + end)
        assert [record["status"] for record in records] == ["ok", "error"]
        assert records[1]["reason"] == why
        assert records[1]["error"] == (tmp_path / "plain.log").read_text()
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"plain-k{tiny_settings().num_speculative_tokens}: {why}. Its log: " + str(
            tmp_path / "plain.log"
        )

    def test_a_mode_is_killed_at_the_time_limit(self, run):
        start = time.monotonic()
        records = run(self.ADD + "time.sleep(60)", time_limit=3)
        assert time.monotonic() - start < 30
        assert [record["status"] for record in records] == ["ok", "no-time"]

    def test_no_mode_is_begun_without_time(self, run):
        (record,) = run(self.ADD, time_limit=0.5)
        assert (record["status"], record["reason"]) == ("no-time", "the table's time limit")

    def test_modes_with_drafts_run_once_for_each_k(self):
        settings = parse_settings("--preset", "7b-cnndm")
        table = compare.mode_processes(["plain", "layerskip"], settings, [12, 6])
        assert [one.name for one in table] == ["plain-k12", "layerskip-e8-k12", "layerskip-e8-k6"]
        assert table[2].settings.synthetic_acceptance_length < 9.27

    def test_a_kind_runs_in_mode_layerskip_alone(self):
        settings = parse_settings("--preset", "7b-cnndm")
        modes = ["plain", "layerskip", "layerskip-no-reuse"]
        table = compare.mode_processes(modes, settings, [12], ["none", "int4"])
        assert [one.name for one in table] == [
            "plain-k12", "layerskip-e8-k12", "layerskip-e8-k12-int4", "layerskip-no-reuse-k12"
        ]  # fmt: skip

    def table(self, *argv):
        return compare.table_from(compare.build_parser().parse_args(argv))

    def test_drafts_of_their_own_lengths_in_rounds(self):
        table = self.table(
            *("--preset", "7b-cnndm", "--modes", "plain", "layerskip", "--rounds", "2"),
            *("--drafts", "8:12", "8:6", "8:12:int4:9.0", "all:4:int4:3.8"),
        )
        names = ["plain-k12", "layerskip-e8-k12", "layerskip-e8-k6", "layerskip-e8-k12-int4",
                 "layerskip-e32-k4-int4"]  # fmt: skip
        assert [one.name for one in table] == names + [f"{name}-round2" for name in names]
        # Another K of the preset keeps the chance of each draft.
        lengths = [one.settings.synthetic_acceptance_length for one in table]
        assert lengths[:5] == [9.27, 9.27, 5.879, 9.0, 3.8]
        assert [one.settings.round for one in table] == [1] * 5 + [2] * 5
        assert len({str(one.settings.identity()) + one.mode for one in table}) == 10
        assert all(one.settings.draft_quantization == "none" for one in (table[0], table[5]))

    def test_drafts_fill_in_what_a_shape_lacks(self):
        (one,) = self.table(
            "--shape", "llama-2-7b", "--modes", "layerskip", "--drafts", "all:4:int8:3.0"
        )
        settings = one.settings
        assert (settings.exit_layer, settings.num_speculative_tokens) == (32, 4)
        assert (settings.draft_quantization, settings.synthetic_acceptance_length) == ("int8", 3.0)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--drafts", "all:4:int4"], "a shape has no acceptance of its own"),
            (["--drafts", "8:4", "--exit-layer", "8"], "--drafts cannot go with --exit-layer"),
            (["--exit-layer", "all"], "with 1 to 31 of this model's 32 layers, or with all (32)"),
            (["--exit-layer", "33", "--draft-quantization", "int4"], "--exit-layer=33: layerskip"),
        ],
    )
    def test_drafts_that_cannot_be(self, argv, message):
        with pytest.raises(UserError, match=re.escape(message)):
            self.table("--preset", "7b-cnndm", *argv)

    @pytest.mark.parametrize("text", ["8", "8:0", "0:4", "8:4:int3", "8:4:int4:x", "8:4:int4:3:1"])
    def test_drafts_are_read_strictly(self, text, capsys):
        with pytest.raises(SystemExit):
            self.table("--preset", "7b-cnndm", "--drafts", text)
        assert "must be E:K, E:K:KIND or E:K:KIND:LENGTH" in capsys.readouterr().err

    def test_each_round_is_measured_anew(self, tmp_path):
        """The second round must not be taken for the first one's resumption."""
        second = in_rounds([ModeProcess("plain", tiny_settings())], 2)[1]
        argv = running.measure_command(second, tmp_path / "x.json")
        assert argv[argv.index("--round") + 1] == "2"
        settings = [replace(tiny_settings(), round=number).identity() for number in (1, 2)]
        record = {"mode": "plain", "status": "ok", "settings": settings[0], "batch_size": 1}
        assert results.finished_cells([record], "plain", settings[0]) == {(1,)}
        assert not results.finished_cells([record], "plain", settings[1])


class TestTrainingText:
    def test_copies_of_held_out_passages_stay_out(self, tmp_path):
        from vllm_layerskip.files.corpus import Corpus, with_packages

        lines = [f"value_{i} = {i}" for i in range(12)]
        corpus = Corpus({"a.py": "x = 1\n"}, {"held.py": "\n".join(lines)})
        texts = {"copy": ["import os", *(f"    {line}\n" for line in lines)], "own": ["y = 2"] * 9}
        for name, text in texts.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "module.py").write_text("\n".join(text))
        more = with_packages(corpus, [tmp_path], 10_000)
        assert sorted(more.train) == ["a.py", "packages/own/module.py"]
        assert with_packages(corpus, [tmp_path], 1).train == corpus.train
