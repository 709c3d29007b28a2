# SPDX-License-Identifier: Apache-2.0
"""A wrong line is named with its file and number; a right one is read as it is."""

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.jsonl import is_text, json_value, jsonl_text, turns_of


def test_a_value_is_read_as_it_is():
    assert json_value('{"a": [1, "é"]}\n', "f, line 1") == {"a": [1, "é"]}
    assert json_value('"é"'.encode(), "f, line 1") == "é"


@pytest.mark.parametrize(
    "line", ["{", "", "'a'", b"\xff", "[" * 100_000], ids=lambda line: repr(line[:9])
)
def test_what_is_no_json_is_named_with_its_place(line):
    with pytest.raises(
        UserError, match=r"^f\.jsonl, line 7: this is no JSON \(.+\)\. Correct the line\.$"
    ):
        json_value(line, "f.jsonl, line 7")


@pytest.mark.parametrize("line", ['"a text"', '{"body": "a text", "text": 3}'])
def test_a_text_is_a_string_or_a_field(line):
    assert jsonl_text(line, "f, line 1", "body") == "a text"


@pytest.mark.parametrize("line", ["3", "null", "[]", '{"text": "a text"}', '{"body": null}'])
def test_a_line_without_a_text_names_the_field_and_its_option(line):
    with pytest.raises(UserError, match=r"^f, line 2: there is no text\..*'body' \(--text-field\)"):
        jsonl_text(line, "f, line 2", "body")


def test_an_empty_text_is_a_text():
    assert jsonl_text('""', "f, line 1", "text") == ""


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"turns": ["a", "b"]}, ("a", "b")),
        ({"turns": []}, ()),
        ({"turns": "ab"}, ()),
        ({"turns": ["a", " "]}, ()),
        ({"turns": ["a", 3]}, ()),
        ({"prompt": "a"}, ()),
    ],
)
def test_turns_are_all_texts_or_none(record, turns):
    assert turns_of(record) == turns


def test_white_space_is_no_text():
    assert is_text(" a\n")
    assert not any(map(is_text, ["", " \n\t", None, 3, ["a"]]))
