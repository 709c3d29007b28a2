# SPDX-License-Identifier: Apache-2.0
"""Catch a null that counts as a value, and a form of row that is not understood."""

from __future__ import annotations

import json

import pytest

from unit.batch.batch_jobs import DEFAULTS, write_rows
from vllm_layerskip.batch.parameters import merged
from vllm_layerskip.batch.rows import checked_row, read_rows
from vllm_layerskip.files.records import Record

CHAT = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
NULLS = {
    "id": None, "custom_id": None, "prompt": None, "prompt_token_ids": None, "messages": None,
    "sampling_params": None, "tools": None,
}  # fmt: skip


def rows_of(tmp_path, *records):
    return list(read_rows([write_rows(tmp_path / "in.jsonl", *records)], DEFAULTS))


def test_nulls_at_every_depth_are_not_given(tmp_path):
    message = {"role": "user", "content": "hi", "tool_calls": None}
    chat, prompt = rows_of(
        tmp_path,
        {**NULLS, "custom_id": "x", "messages": [message], "note": None},
        {**NULLS, "prompt": "a", "sampling_params": {"temperature": None, "max_tokens": 8}},
    )
    assert (chat.error, chat.id, chat.messages) == (None, "x", tuple(CHAT))
    assert chat.columns == {"note": None, "tools": None}
    assert (prompt.error, prompt.id) == (None, None)
    assert prompt.sampling_params == merged({}, {"max_tokens": 8})


def test_structs_of_parquet_are_padded_with_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [
        {"prompt": "a", "sampling_params": {"temperature": 0.5}},
        {"prompt": "b", "sampling_params": {"max_tokens": 8}},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "tool", "content": "1", "tool_call_id": "c"}]},
    ]
    names = ("prompt", "messages", "sampling_params")
    same = [{name: record.get(name) for name in names} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(same), tmp_path / "in.parquet")
    rows = list(read_rows([tmp_path / "in.parquet"], DEFAULTS))
    assert [row.error for row in rows] == [None] * 4
    assert [row.sampling_params for row in rows] == [
        merged({}, {"temperature": 0.5}), merged({}, {"max_tokens": 8}), DEFAULTS, DEFAULTS,
    ]  # fmt: skip
    assert rows[2].messages == tuple(CHAT)


def test_a_text_is_a_prompt(tmp_path):
    (tmp_path / "in.txt").write_text("one\n\ntwo\n")
    rows = list(read_rows([tmp_path / "in.txt"], DEFAULTS))
    assert [row.prompt for row in rows] == ["one", "two"]
    assert [row.prompt for row in rows_of(tmp_path, '"three"')] == ["three"]


def test_texts_may_be_in_another_column(tmp_path):
    rows = [
        {"question": "a", "prompt": "a column", "text": "b"},
        '"c"',
        {"body": {"prompt": "d"}},
        {"messages": CHAT, "question": None},
        {"prompt": "e"},
    ]
    files = [write_rows(tmp_path / "in.jsonl", *rows)]
    first, second, third, chat, without = read_rows(files, DEFAULTS, "question")
    assert [row.prompt for row in (first, second, third)] == ["a", "c", "d"]
    assert first.columns == {"prompt": "a column", "text": "b"}
    assert (chat.error, chat.columns) == (None, {})
    assert "must have one of question, prompt_token_ids, messages" in (without.error or "")


def test_tools_belong_to_the_chat_and_are_handed_through(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    (row,) = rows_of(tmp_path, {"messages": CHAT, "tools": tools})
    assert row.tools == tools
    assert row.columns == {"tools": tools}
    (as_json,) = rows_of(tmp_path, {"messages": CHAT, "tools": json.dumps(tools)})
    assert (as_json.error, as_json.tools) == (None, json.dumps(tools))
    (other,) = rows_of(tmp_path, {"prompt": "a", "tools": "a hammer"})
    assert (other.error, other.columns) == (None, {"tools": "a hammer"})


def test_a_null_within_tools_is_meant_in_json_and_padding_in_a_table():
    tools = [{**TOOL, "function": {**TOOL["function"], "parameters": {"default": None}}}]
    value = {"messages": CHAT, "tools": tools}
    assert checked_row(0, Record("f", value), {}).tools == tools
    (without,) = checked_row(0, Record("f", value, is_row=True), {}).tools
    assert without["function"]["parameters"] == {}


def test_pandas_nulls_are_not_given():
    """It has NaN where an integer is missing, and makes the integers beside it floats."""
    value = {
        "prompt": "a", "id": float("nan"), "custom_id": 7.0, "note": float("nan"),
        "sampling_params": {"max_tokens": 8.0, "seed": float("nan"), "temperature": 0.5},
    }  # fmt: skip
    row = checked_row(0, Record("f", value, is_row=True), {})
    assert (row.error, row.id) == (None, 7)
    assert row.sampling_params == merged({}, {"max_tokens": 8, "temperature": 0.5})
    assert checked_row(0, Record("f", value), {}).error is not None, "JSON has integers"


def test_with_two_ids_the_second_one_is_a_column(tmp_path):
    (row,) = rows_of(tmp_path, {"prompt": "a", "custom_id": "c", "id": 1})
    assert (row.id, row.columns) == (1, {"custom_id": "c"})


def test_openais_batch_form(tmp_path):
    body = {
        "model": "gpt", "messages": CHAT, "max_completion_tokens": 5, "stop": "\n", "n": 1,
        "temperature": None, "stream": False, "echo": False, "top_k": -1, "tool_choice": "auto",
        "tools": [TOOL],
    }  # fmt: skip
    request = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": body}
    chat, text, tokens, own = rows_of(
        tmp_path,
        {**request, "note": 1},
        {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "a", "seed": 3}},
        {"body": {"prompt": [3, 4]}},
        {"prompt": "a", "body": {"prompt": "an e-mail"}, "url": 3},
    )
    assert (chat.error, chat.id, chat.messages) == (None, "r", tuple(CHAT))
    assert chat.sampling_params == merged({}, {"max_tokens": 5, "stop": ["\n"]})
    assert chat.tools == [TOOL]
    assert chat.columns == {"note": 1, "tools": [TOOL]}
    assert (text.prompt, text.sampling_params) == ("a", merged({}, {"seed": 3}))
    assert tokens.prompt_token_ids == (3, 4)
    assert own.columns == {"body": {"prompt": "an e-mail"}, "url": 3}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"method": "GET"}, "method='GET' must be 'POST'"),
        ({"url": "/v1/embeddings"}, "url='/v1/embeddings' must be /v1/chat/completions or"),
        ({"body": {"messages": CHAT, "n": 2}}, "body: n must be 1"),
        ({"body": {"messages": CHAT, "stream": True}}, "body: stream must be False"),
        ({"body": {"messages": CHAT, "logprobs": True}}, "body: logprobs must be False"),
        ({"body": {"messages": CHAT, "top_p": 0}}, "body: top_p=0 must be a number above 0"),
        ({"body": {"prompt": ["a", "b"]}}, "prompt=['a', 'b'] must be a text"),
        ({"body": {"input": "a"}}, "this one has none of them"),
    ],
)
def test_what_is_not_answered_of_openais_form_is_refused(tmp_path, change, error):
    (row,) = rows_of(tmp_path, {"custom_id": "r", "body": {"messages": CHAT}, **change})
    assert error in (row.error or "")
    assert row.id == "r"
