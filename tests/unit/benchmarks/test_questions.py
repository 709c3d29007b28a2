# SPDX-License-Identifier: Apache-2.0
"""Readers of questions, an even choice of them, and the questions that are made here."""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from benchmarks.engines.questions import (
    Question,
    choose_evenly,
    read_questions,
    require_different_ids,
)
from benchmarks.prompts import held_out_functions, word_problems
from vllm_layerskip.errors import UserError

from .records import GSM8K, HUMAN_EVAL, SPEC_BENCH, write_lines


class TestReaders:
    @pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
    @pytest.mark.parametrize(
        ("record", "expected"),
        [
            (SPEC_BENCH, Question("81", "writing", ("Write.", "Rewrite."))),
            (HUMAN_EVAL, Question("HumanEval/0", "HumanEval", ("def f():\n",))),
            (GSM8K, Question("1", "gsm8k", ("How many?",))),
            ({"prompt": "x = 1"}, Question("1", "all", ("x = 1",))),
        ],
        ids=["spec-bench", "humaneval", "gsm8k", "prompt"],
    )
    def test_each_format(self, tmp_path, record, expected, name):
        assert read_questions(write_lines(tmp_path / name, record)) == [expected]

    def test_a_chat_model_is_asked_to_complete_a_function(self, tmp_path):
        method = {"task_id": "shelf/get-7", "prompt": '    def get(self):\n        """Get."""\n'}
        path = write_lines(tmp_path / "q.jsonl", method, SPEC_BENCH, GSM8K, {"prompt": "x = 1"})
        first, *others = read_questions(path, chat=True)
        assert first.turns == (
            'Complete this Python function.\n\n```python\ndef get(self):\n    """Get."""\n```',
        )
        assert (first.id, first.category) == ("shelf/get-7", "shelf")
        assert others == read_questions(path)[1:]

    def test_lines_of_gsm8k_have_ids_of_their_own(self, tmp_path):
        path = write_lines(tmp_path / "q.jsonl", GSM8K, GSM8K)
        assert [question.id for question in read_questions(path)] == ["1", "2"]

    @pytest.mark.parametrize(
        ("line", "error"),
        [
            ("{", "line 2: this is no JSON (.*)"),
            ("[]", "line 2: this is no question. A line must have turns"),
            ('{"turns": []}', "line 2: this is no question"),
            ('{"turns": ["a", 3]}', "line 2: this is no question"),
            ('{"task_id": "a/1", "prompt": " "}', "line 2: this is no question"),
            ('{"question": 7}', "line 2: this is no question"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, error):
        path = tmp_path / "q.jsonl"
        path.write_text(f"{json.dumps(HUMAN_EVAL)}\n{line}\n")
        with pytest.raises(UserError, match=rf"q\.jsonl.*{error}"):
            read_questions(path)

    def test_ids_must_differ(self, tmp_path):
        path = write_lines(tmp_path / "q.jsonl", HUMAN_EVAL, HUMAN_EVAL)
        questions = read_questions(path)
        with pytest.raises(UserError, match="id HumanEval/0 is there twice. Make ids differ"):
            require_different_ids(questions, path)

    @pytest.mark.parametrize(
        ("name", "content", "error"),
        [
            ("none.jsonl", None, "no such file"),
            ("empty.jsonl", b"\n\n", "no question in it"),
            ("bytes.jsonl", b"\xff\xfe\x00", "no UTF-8 text"),
            ("plain.jsonl.gz", b"{}", "Give a readable file"),
            # Without the time, so that both of pytest's workers name the tests alike.
            ("cut.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "Give a readable file"),
            ("broken.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 40, "readable file"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, name, content, error):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}.*{error}"):
            read_questions(tmp_path / name)


class TestEvenChoice:
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
        chosen = choose_evenly(self.QUESTIONS, number)
        assert Counter(question.category for question in chosen) == Counter(sizes)
        assert [q for q in self.QUESTIONS if q in chosen] == chosen

    @pytest.mark.parametrize("number", [None, 12, 99])
    def test_all(self, number):
        assert choose_evenly(self.QUESTIONS, number) == list(self.QUESTIONS)


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


class TestWordProblems:
    MADE = tuple(islice(word_problems.problems(0), 280))

    def test_there_are_templates_of_two_to_four_steps(self):
        assert len(word_problems.TEMPLATES) >= 12
        assert {len(problem.steps) for problem in self.MADE} == {2, 3, 4}

    @pytest.mark.parametrize("problem", MADE[:140], ids=range(140))
    def test_every_number_of_a_step_is_asked_for_or_made_before(self, problem):
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        # Three throws have an average.
        known |= {3} if "average" in problem.question else set()
        for left, operator, right in problem.steps:
            assert {left, right} <= known, problem
            known.add(word_problems.result_of((left, operator, right)))
        assert word_problems.result_of(problem.steps[-1]) > 0

    def test_the_answer_has_the_steps_and_the_result(self):
        for problem in self.MADE:
            *steps, last = word_problems.record(problem)["answer"].splitlines()
            for step in steps:
                left, right = step.split(" = ")
                assert eval(left) == int(right)
            assert last == f"#### {steps[-1].split(' = ')[1]}"

    def test_problems_differ(self):
        assert len({problem.question for problem in self.MADE}) > 270

    def test_a_division_with_a_remainder_is_refused(self):
        with pytest.raises(ValueError, match="7 / 2 has no whole result"):
            word_problems.result_of((7, "/", 2))

    def test_the_same_arguments_make_the_same_file_and_it_is_read(self, tmp_path, monkeypatch):
        def made(*arguments):
            text = io.StringIO()
            monkeypatch.setattr(sys, "argv", ["word_problems", *arguments])
            with contextlib.redirect_stdout(text):
                word_problems.main()
            return text.getvalue()

        assert made("30") == made("30", "--seed", "0")
        assert made("60").startswith(made("30"))
        assert made("30") != made("30", "--seed", "1")
        path = tmp_path / "word-problems.jsonl"
        path.write_text(made("30"))
        questions = read_questions(path, chat=True)
        assert [question.id for question in questions] == [str(n) for n in range(1, 31)]
        assert {question.category for question in questions} == {"gsm8k"}
