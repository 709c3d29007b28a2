# SPDX-License-Identifier: Apache-2.0
"""Readers, selection, prompts and statistics of real_prompts.py.

engine/test_real_prompts.py runs it.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.prompts import (
    held_out_functions,
    real_prompts,
)
from benchmarks.prompts import summary as prompt_summary
from benchmarks.prompts.chats import Chats
from benchmarks.prompts.measure import Turn
from benchmarks.prompts.questions import Question, read_questions, spread

ROOT = Path(__file__).parents[3]

EMBEDDED = ROOT / "vllm_layerskip" / "checkpoint"
SPEC_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
HUMAN_EVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}
GSM8K = {"question": "How many?", "answer": "#### 3"}


def write_lines(path, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


class TestReaders:
    @pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
    @pytest.mark.parametrize(
        ("record", "expected"),
        [
            (SPEC_BENCH, Question("81", "writing", ("Write.", "Rewrite."))),
            (HUMAN_EVAL, Question("HumanEval/0", "HumanEval", ("def f():\n",))),
            (GSM8K, Question("1", "gsm8k", ("How many?",))),
        ],
        ids=["spec-bench", "humaneval", "gsm8k"],
    )
    def test_each_format(self, tmp_path, record, expected, name):
        assert read_questions(write_lines(tmp_path / name, record)) == [expected]

    def test_lines_of_gsm8k_have_ids_of_their_own(self, tmp_path):
        path = write_lines(tmp_path / "q.jsonl", GSM8K, GSM8K)
        assert [question.id for question in read_questions(path)] == ["1", "2"]

    @pytest.mark.parametrize(
        ("line", "error"),
        [
            ("{", "line 2: this is no JSON (.*). Correct the line"),
            ("[]", "line 2: this is no question. A line must have turns"),
            ('{"turns": []}', "line 2: this is no question"),
            ('{"turns": ["a", 3]}', "line 2: this is no question"),
            ('{"task_id": "a/1", "prompt": " "}', "line 2: this is no question"),
            ('{"question": 7}', "line 2: this is no question"),
            (json.dumps(HUMAN_EVAL), "id HumanEval/0 is there twice. Make ids differ"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, error):
        path = tmp_path / "q.jsonl"
        path.write_text(f"{json.dumps(HUMAN_EVAL)}\n{line}\n")
        with pytest.raises(ValueError, match=rf"q\.jsonl.*{error}"):
            read_questions(path)

    @pytest.mark.parametrize(
        ("name", "content", "error"),
        [
            ("none.jsonl", None, "No such file"),
            ("empty.jsonl", b"\n\n", "no question in it"),
            ("bytes.jsonl", b"\xff\xfe\x00", "Give a readable file"),
            ("plain.jsonl.gz", b"{}", "Give a readable file"),
            # Without the time, so that both of pytest's workers name the tests alike.
            ("cut.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "Give a readable file"),
            ("broken.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 40, "readable file"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, name, content, error):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*{error}"):
            read_questions(tmp_path / name)


class TestSpread:
    QUESTIONS = tuple(
        Question(f"{category}{number}", category, ("?",))
        for category, size in (("a", 6), ("b", 2), ("c", 4))
        for number in range(size)
    )

    @pytest.mark.parametrize(
        ("number", "sizes"),
        [
            (1, "a"),
            (2, "ab"),
            (3, "abc"),
            (7, "aaabbcc"),
            (10, "aaaabbcccc"),
            (12, "a" * 6 + "bbcccc"),
        ],
    )
    def test_categories_have_equal_shares(self, number, sizes):
        chosen = spread(self.QUESTIONS, number)
        assert Counter(question.category for question in chosen) == Counter(sizes)
        assert [q for q in self.QUESTIONS if q in chosen] == chosen

    @pytest.mark.parametrize("number", [None, 12, 99])
    def test_all(self, number):
        assert spread(self.QUESTIONS, number) == list(self.QUESTIONS)


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
        rows = real_prompts.table([self.PLAIN, self.OURS]).splitlines()[2:]
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
        assert "| c | 1 | 2 | 2.93 | 2.00 |" in real_prompts.category_table(records, speedups=True)
        assert "| c | 1 | 2 | 2.93 |\n" in real_prompts.category_table(records, speedups=False)

    def test_spread(self):
        assert prompt_summary.runs_spread({"runs_tokens_per_s": [8.0, 10.0, 11.0]}) == 0.3

    def test_speed_ups_of_any_two_runs(self):
        ours, plain = ({"runs_tokens_per_s": speeds} for speeds in ([8.0, 12.0], [4.0, 5.0, 6.0]))
        assert prompt_summary.speedup_range(ours, plain) == (8 / 6, 3.0)


class TestRuns:
    def test_each_mode_runs_once_for_what_it_depends_on(self):
        pairs = [(3, 5), (9, 5), (3, 2)]
        found = real_prompts.runs(["plain", "layerskip", "ngram"], pairs)
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
        found = real_prompts.jobs(real_prompts.parse_args([*argv, "--max-tokens", "40"]))
        assert [job["mode"] for job in found] == ["plain", "layerskip", "layerskip"]
        for job in found:
            assert [question["id"] for question in job["questions"]] == ["81"]
            assert job["source"]["too_long"] == {"long": 1}
            settings = real_prompts.Settings(**job["settings"])
            assert settings.max_model_len == 512
            # Prompt, answer and a last step's drafts have room, also with the larger K.
            assert job["sampling"]["max_prompt_tokens"] == 512 - 40 - 5 - 1

    def test_resume_measures_what_is_missing_and_refuses_other_settings(
        self, tmp_path, monkeypatch, capsys
    ):
        path, output = write_lines(tmp_path / "q.jsonl", SPEC_BENCH), tmp_path / "out.json"
        measured = []

        def run_job(job, folder):
            settings = real_prompts.Settings(**job["settings"])
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
        assert main("--pairs", "3:5", "9:5", "--max-tokens", "8", "--resume") == 2
        assert "has other runs (plain;" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main("--pairs", "3:5")
        assert "exists. Add --resume" in capsys.readouterr().err
        assert len(measured) == len(real_prompts.load(output)) == 3

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
            (["--repeats", "0"], "--repeats must be an integer of at least 1"),
            (["--pairs", "12:2"], "--pairs 12:2: E must be from 1 to 11"),
            (["--pairs", "3:0"], "K at least 1"),
            (["--max-tokens", "512"], "--max-tokens 512 leaves no room for a prompt"),
            (["--max-tokens", "505"], "none has a first prompt of at most 1 tokens"),
            (["--questions", "none.jsonl"], "none.jsonl: .*No such file"),
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
        text = real_prompts.left_out([one])
        assert "questions of the file by their first prompt, 86 (rag 80, extraction 6)" in text
        assert "later turns, whose prompt has the answer before, 2 (writing 2)" in text
        assert "458 tokens" in text
        empty = one | {"questions": {"too_long": {}}, "later_turns_left_out": {}}
        assert real_prompts.left_out([empty]) == "Nothing was left out."

    def test_another_kind_of_file_is_refused(self):
        with pytest.raises(ValueError, match=r"cpu-1b\.json is no result file of real_prompts"):
            real_prompts.load(ROOT / "benchmarks" / "results" / "cpu-1b.json")


class TestHeldOutFunctions:
    SOURCE = '''\
import os

def plain(x):
    "One line."
    return x

def undocumented():
    return 1

def nothing_but_a_docstring():
    """Nothing."""

class Shelf:
    def method(self, y=(1,
                        2)):
        """Two
        lines.
        """
        for z in y:
            yield z
'''

    def test_signature_and_docstring_and_the_body_behind_them(self):
        plain, method = held_out_functions.functions("json/encoder", self.SOURCE)
        assert plain == {
            "task_id": "json/encoder/plain-3",
            "prompt": 'def plain(x):\n    "One line."\n',
            "canonical_solution": "    return x\n",
            "entry_point": "plain",
        }
        assert method["prompt"].startswith("    def method(self, y=(1,\n")
        assert method["prompt"].endswith('        lines.\n        """\n')
        assert method["canonical_solution"] == "        for z in y:\n            yield z\n"

    def test_questions_of_the_running_python_are_whole_functions_of_many_modules(self, tmp_path):
        script = [sys.executable, "-m", "benchmarks.prompts.held_out_functions", "30"]
        text = subprocess.run(script, capture_output=True, text=True, check=True).stdout
        path = tmp_path / "functions.jsonl"
        path.write_text(text)
        questions = read_questions(path)
        assert len(questions) == 30
        assert len({question.category for question in questions}) >= 15
        for line in text.splitlines():
            function = json.loads(line)
            source = "if 1:\n " + (function["prompt"] + function["canonical_solution"]).replace(
                "\n", "\n "
            )
            (definition,) = ast.parse(source).body[0].body
            assert definition.name == function["entry_point"]
