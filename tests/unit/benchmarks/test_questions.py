# SPDX-License-Identifier: Apache-2.0
"""Readers of questions, an even choice of them, and the questions that are made here."""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.engines.questions import (
    Question,
    choose_evenly,
    read_questions,
    require_different_ids,
)
from benchmarks.prompts import held_out_functions
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
