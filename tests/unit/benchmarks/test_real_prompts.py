# SPDX-License-Identifier: Apache-2.0
"""Prompts, statistics, tables and processes of benchmarks.prompts.real_prompts.

tests/engine/commands/test_real_prompts.py runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engines.questions import Question
from benchmarks.engines.settings import Settings
from benchmarks.prompts import real_prompts
from benchmarks.prompts import summary as prompt_summary
from benchmarks.prompts.chats import Chats
from benchmarks.prompts.jobs import jobs, modes_with_pairs
from benchmarks.prompts.measure import Turn
from benchmarks.prompts.records import load
from benchmarks.prompts.tables import category_table, left_out, table
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.errors import UserError

from .records import SPEC_BENCH, write_lines

ROOT = Path(__file__).parents[3]
EMBEDDED = embedded_checkpoint()


class TestChats:
    @pytest.fixture(scope="class")
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(EMBEDDED)

    def test_a_second_turn_has_the_first_and_its_answer_before_it(self, tokenizer):
        answer = tokenizer("    return 1\n", add_special_tokens=False)["input_ids"]
        ended = [*answer, tokenizer.eos_token_id]
        ids = Chats(tokenizer, chat=False).token_ids(("def f():\n", "def g():\n"), [ended])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == "def f():\n    return 1\n\n\ndef g():\n"
        assert ids.count(tokenizer.eos_token_id) == 0

    def test_the_template_writes_the_special_tokens_once(self, tokenizer):
        ids = Chats(tokenizer, chat=True).token_ids(("a", "b"), [tokenizer("x")["input_ids"]])
        # The embedded template ends each message with a line's end.
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a\nx\nb\n"
        assert ids.count(tokenizer.bos_token_id) == 1


def answer(key, tokens, steps, accepted, *, total_ms, tpot_ms, output="same", category="c"):
    return {
        "key": key, "question": key.partition("#")[0], "category": category,
        "num_tokens": tokens, "num_steps": steps, "num_draft_tokens": 5 * steps,
        "num_accepted_tokens": accepted, "total_ms": total_ms, "tpot_ms": tpot_ms, "output": output,
    }  # fmt: skip


def record(mode, *answers, temperature=0.0, e=3, k=5):
    if mode == "plain":
        answers = [a | {"num_draft_tokens": 0, "num_accepted_tokens": 0} for a in answers]
    return {
        "mode": mode,
        "answers": list(answers),
        "settings": {"exit_layer": e, "num_speculative_tokens": k, "draft_vocab": None},
        "sampling": {"temperature": temperature},
    }


class TestStatistics:
    PLAIN = record(
        "plain",
        answer("q#0", 10, 9, 0, total_ms=[100, 900, 110], tpot_ms=[10, 90, 11]),
        answer("q#1", 30, 29, 0, total_ms=[390, 390, 390], tpot_ms=[13, 13, 13]),
        answer("r#0", 20, 19, 0, total_ms=[200, 200, 200], tpot_ms=[10, 10, 10], category="d"),
    )
    OURS = record(
        "layerskip",
        answer("q#0", 10, 4, 5, total_ms=[55, 55, 550], tpot_ms=[5, 5, 50]),
        answer("q#1", 30, 10, 22, total_ms=[195, 195, 195], tpot_ms=[6, 6, 6]),
        answer("r#0", 20, 9, 10, total_ms=[400, 400, 400], tpot_ms=[20, 20, 20], category="d",
               output="another"),
    )  # fmt: skip

    def test_by_category_and_over_all(self):
        c, d, both = prompt_summary.summarize(self.OURS, self.PLAIN)
        assert (c.category, d.category, both.category) == ("c", "d", "all")
        assert (c.num_questions, c.num_answers, c.num_tokens) == (1, 2, 20)
        assert (both.num_questions, both.num_answers) == (2, 3)
        assert c.acceptance_length == pytest.approx(1 + 27 / 14)
        assert d.acceptance_length == pytest.approx(1 + 10 / 9)
        assert both.acceptance_length == pytest.approx(1 + 37 / 23)
        assert (c.num_equal, d.num_equal, both.num_equal) == (2, 0, 2)

    def test_speeds_are_spec_benchs_over_medians_of_the_runs(self):
        c, d, both = prompt_summary.summarize(self.OURS, self.PLAIN)
        # Both turns of a question together; plain's runs of q#0 have the median 110 ms.
        assert c.tokens_per_s == pytest.approx(1e3 * 40 / 250)
        assert c.speedup == pytest.approx(500 / 250)
        assert d.speedup == pytest.approx(0.5)
        # The ratio of means, not the mean of ratios.
        assert both.speedup == pytest.approx((160 + 50) / (80 + 100))
        assert c.decoding_speedup == pytest.approx((11 + 13) / (5 + 6))

    def test_plain_has_no_acceptance_and_is_its_own_measure(self):
        *_, both = prompt_summary.summarize(self.PLAIN, self.PLAIN)
        assert both.acceptance_length is None
        assert both.speedup == both.decoding_speedup == 1
        assert both.num_equal == both.num_answers == 3

    def test_a_step_without_a_draft_counts_as_one_token(self):
        one = answer("q#0", 9, 6, 2, total_ms=[1], tpot_ms=[1]) | {"num_draft_tokens": 2}
        (only,) = prompt_summary.summarize(record("ngram", one), self.PLAIN)
        assert only.acceptance_length == pytest.approx(1 + 2 / 6)

    def test_turns_that_only_one_mode_could_ask_are_left_out_and_are_a_difference(self):
        fewer = record("layerskip", *self.OURS["answers"][:1])
        (only,) = prompt_summary.summarize(fewer, self.PLAIN)
        assert only.num_answers == 1
        assert prompt_summary.outputs_differ(fewer, self.PLAIN)
        assert prompt_summary.summarize(self.PLAIN, fewer)[0].num_answers == 1
        assert not prompt_summary.outputs_differ(self.PLAIN, self.PLAIN)

    def test_sampled_outputs_are_not_compared(self):
        sampled = record("layerskip", *self.OURS["answers"], temperature=0.8)
        assert {r.num_equal for r in prompt_summary.summarize(sampled, self.PLAIN)} == {None}

    def test_an_answer_of_one_token_has_no_time_of_decoding(self):
        single = answer("q#0", 1, 0, 0, total_ms=[10], tpot_ms=[None])
        (only,) = prompt_summary.summarize(record("layerskip", single), record("plain", single))
        assert only.decoding_speedup is None
        assert only.speedup == 1

    def test_a_turns_times(self):
        turn = Turn(Question("q", "c", ("?",)), start=1.0, arrivals=[(3.0, 1), (4.0, 3), (5.0, 1)])
        assert (turn.num_steps, turn.seconds, turn.tpot_s) == (2, 4.0, 0.5)
        assert Turn(turn.question, arrivals=[(3.0, 1)]).tpot_s is None

    def test_the_table_has_each_mode_in_each_category(self):
        rows = table([self.PLAIN, self.OURS]).splitlines()[2:]
        assert [row.split(" | ")[0].strip("| ") for row in rows] == [
            "c",
            "c",
            "d",
            "d",
            "all",
            "all",
        ]
        assert "| layerskip, E = 3, K = 5 | 2.93 | 160.0 | 2.00 | 2.18 | 2 of 2 |" in rows[1]
        records = [self.PLAIN, self.OURS]
        assert "| c | 1 | 2 | 2.93 | 2.00 |" in category_table(records, speedups=True)
        assert "| c | 1 | 2 | 2.93 |\n" in category_table(records, speedups=False)

    def test_spread(self):
        assert prompt_summary.runs_spread({"runs_tokens_per_s": [8.0, 10.0, 11.0]}) == 0.3

    def test_speed_ups_of_any_two_runs(self):
        ours, plain = ({"runs_tokens_per_s": speeds} for speeds in ([8.0, 12.0], [4.0, 5.0, 6.0]))
        assert prompt_summary.speedup_range(ours, plain) == (8 / 6, 3.0)


class TestRuns:
    def test_each_mode_runs_once_for_what_it_depends_on(self):
        pairs = [(3, 5), (9, 5), (3, 2)]
        found = modes_with_pairs(["plain", "layerskip", "ngram"], pairs)
        assert found == [
            ("plain", (3, 5)),
            *(("layerskip", pair) for pair in pairs),
            ("ngram", (3, 5)),
            ("ngram", (3, 2)),
        ]

    def test_every_mode_gets_the_same_questions_and_model_length(self, tmp_path):
        long = {"question_id": 2, "category": "long", "turns": ["x = 1\n" * 400, "again"]}
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH, long)
        argv = ["--model", str(EMBEDDED), "--questions", str(path), "--pairs", "3:5", "9:2"]
        found = jobs(real_prompts.build_parser().parse_args([*argv, "--max-tokens", "40"]))
        assert [job["mode"] for job in found] == ["plain", "layerskip", "layerskip"]
        for job in found:
            assert [question["id"] for question in job["questions"]] == ["81"]
            assert job["source"]["too_long"] == {"long": 1}
            settings = Settings(**job["settings"])
            assert settings.max_model_len == 512
            # Prompt, answer and a last step's drafts have room, also with the larger K.
            assert job["sampling"]["max_prompt_tokens"] == 512 - 40 - 5 - 1

    def test_resume_measures_what_is_missing_and_refuses_other_settings(
        self, tmp_path, monkeypatch, capsys
    ):
        path, output = write_lines(tmp_path / "q.jsonl", SPEC_BENCH), tmp_path / "out.json"
        measured = []

        def run_job(job, folder):
            settings = Settings(**job["settings"])
            measured.append((job["mode"], settings.exit_layer))
            return record(
                job["mode"], answer("81#0", 9, 4, 4, total_ms=[1], tpot_ms=[1])
            ) | {
                "settings": settings.identity() | {"batch_size": 1},
                "sampling": job["sampling"],
                "questions": job["source"],
                "later_turns_left_out": {},
                "runs_tokens_per_s": [1.0],
            }  # fmt: skip

        def main(*options):
            argv = ["real_prompts.py", "--model", str(EMBEDDED), "--questions", str(path)]
            monkeypatch.setattr(sys, "argv", [*argv, "--output", str(output), *options])
            return real_prompts.main()

        monkeypatch.setattr(real_prompts, "run_job", run_job)
        assert main("--pairs", "3:5") == 0
        assert main("--pairs", "3:5", "9:5", "--resume") == 0
        assert measured == [("plain", 3), ("layerskip", 3), ("layerskip", 9)]
        with pytest.raises(SystemExit, match="2"):
            main("--pairs", "3:5", "9:5", "--max-tokens", "8", "--resume")
        assert "has other runs (plain;" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main("--pairs", "3:5")
        assert "exists. Add --resume" in capsys.readouterr().err
        assert len(measured) == len(load(output)) == 3

    def test_the_modes_that_do_not_fail_are_kept(self, tmp_path, monkeypatch, capsys):
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH)

        def run_job(job, folder):
            raise RuntimeError(f"{job['mode']} failed:\nits log")

        monkeypatch.setattr(real_prompts, "run_job", run_job)
        argv = ["real_prompts.py", "--model", str(EMBEDDED), "--questions", str(path)]
        monkeypatch.setattr(sys, "argv", argv)
        assert real_prompts.main() == 1
        assert capsys.readouterr().err.count("failed:\nits log") == 2

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            (["--modes", "layerskip"], "must include plain"),
            (["--pairs", "8"], "must be E:K, such as 8:6"),
            (["--repeats", "0"], "--repeats: '0' must be an integer of at least 1"),
            (["--pairs", "12:2"], "--pairs 12:2: E must be from 1 to 11"),
            (["--pairs", "3:0"], "K at least 1"),
            (["--max-tokens", "512"], "--max-tokens 512 leaves no room for a prompt"),
            (["--max-tokens", "505"], "none has a first prompt of at most 1 tokens"),
            (["--questions", "none.jsonl"], "none.jsonl: .*no such file"),
            (["--model", "none"], "--model=none is no checkpoint folder"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_named_before_anything_starts(self, tmp_path, options, error):
        path = write_lines(tmp_path / "q.jsonl", SPEC_BENCH)
        argv = ["--model", str(EMBEDDED), "--questions", str(path), *options]
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.prompts.real_prompts", *argv],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 2
        (message,) = [line for line in process.stderr.splitlines() if ": error: " in line]
        assert re.search(error, message)

    def test_what_is_left_out_is_counted(self):
        one = {
            "questions": {"too_long": {"rag": 80, "extraction": 6}},
            "later_turns_left_out": {"writing": 2},
            "sampling": {"max_prompt_tokens": 458},
        }
        text = left_out([one])
        assert "questions of the file by their first prompt, 86 (rag 80, extraction 6)" in text
        assert "later turns, whose prompt has the answer before, 2 (writing 2)" in text
        assert "458 tokens" in text
        empty = one | {"questions": {"too_long": {}}, "later_turns_left_out": {}}
        assert left_out([empty]) == "Nothing was left out."

    def test_another_kind_of_file_is_refused(self):
        with pytest.raises(UserError, match=r"1b\.json is no result file of real_prompts"):
            load(ROOT / "benchmarks" / "results" / "twins-cpu-1b.json")
