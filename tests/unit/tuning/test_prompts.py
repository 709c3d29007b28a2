# SPDX-License-Identifier: Apache-2.0
"""Catch prompts that are read wrongly, and a bad file whose error helps nobody."""

import json
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.prompts import Prompt, encode_prompts, evenly_spaced, read_prompts

MODEL = str(Path(vllm_layerskip.__file__).parent / "checkpoint")


def _file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_spec_bench_gives_first_turns_and_categories(tmp_path):
    records = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 241, "category": "qa", "turns": ["Who?"]},
    ]
    path = _file(tmp_path, "question.jsonl", "\n".join(map(json.dumps, records)))
    assert read_prompts([path]) == [Prompt("Write.", "writing"), Prompt("Who?", "qa")]


def test_only_the_first_turn_must_be_a_text(tmp_path):
    assert read_prompts([_file(tmp_path, "q.jsonl", '{"turns": ["Write.", 3]}')]) == [
        Prompt("Write.")
    ]


def test_json_lines_and_plain_lines(tmp_path):
    lines = '"a string"\n\n{"prompt": "two\\nlines"}\n{"text": "t", "category": 3}\n'
    assert [p.text for p in read_prompts([_file(tmp_path, "p.jsonl", lines)])] == [
        "a string", "two\nlines", "t"
    ]  # fmt: skip
    plain = read_prompts([_file(tmp_path, "p.txt", "one\n\n{two}\n")])
    assert plain == [Prompt("one"), Prompt("{two}")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", None, ("no such file", ".jsonl")),
        ("p.txt", "", ("there is no prompt in it",)),
        ("p.txt", " \n\n", ("there is no prompt in it",)),
        ("p.jsonl", "", ("there is no prompt in it",)),
        ("p.txt", b"\xff\xfe\x00", ("no UTF-8 text", "Convert")),
        ("p.jsonl", '{"prompt": "a"}\n{oops\n', ("line 2", "no JSON")),
        *[
            ("p.jsonl", json.dumps(value), ("line 1", "'prompt' or 'text'", "'turns'"))
            for value in (3, None, "", [], ["a"], {}, {"prompt": ""}, {"turns": []}, {"turns": [3]})
        ],
    ],
    ids=repr,
)
def test_a_bad_file_is_refused_with_a_remedy(tmp_path, name, content, says):
    path = tmp_path / name if content is None else _file(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_prompts([path])
    for words in (f"--prompts {path}", *says):
        assert words in str(error.value)


def test_another_field_is_the_only_one_that_counts(tmp_path):
    record = {"prompt": "p", "turns": ["t"], "messages": [{"role": "user"}], "body": "b"}
    file = _file(tmp_path, "q.jsonl", json.dumps(record))
    assert read_prompts([file], "body") == [Prompt("b")]
    with pytest.raises(UserError, match=r"line 1: there is no prompt.*'question' \(--text-field\)"):
        read_prompts([file], "question")


def test_chats_are_prompts_with_their_tools(tmp_path):
    message, tool = {"role": "user", "content": "Hello"}, {"type": "function"}
    rows = [
        {"messages": [message], "tools": None, "category": "chat"},
        {"messages": [{**message, "name": None}], "tools": [tool]},
        {"messages": [], "prompt": "p"},
    ]
    file = _file(tmp_path, "q.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompts([file]) == [
        Prompt("", "chat", (message,)), Prompt("", None, ({**message, "name": None},), [tool]),
        Prompt("p"),
    ]  # fmt: skip


def test_a_chat_is_encoded_by_the_template_with_and_without_the_option():
    chat = Prompt("", messages=({"role": "user", "content": "Hello"},))
    expected = encode_prompts([Prompt("Hello")], MODEL, 64, chat=True).token_ids
    assert encode_prompts([chat], MODEL, 64, chat=False).token_ids == expected
    assert encode_prompts([chat], MODEL, 64, chat=True).token_ids == expected


def test_a_chat_that_cannot_be_rendered_is_named():
    chat = Prompt("", messages=({"role": "user", "content": 3},), where="q.jsonl, line 7")
    with pytest.raises(UserError, match=r"^--prompts q\.jsonl, line 7: "):
        encode_prompts([chat], MODEL, 64, chat=False)


def test_half_a_surrogate_pair_is_named(tmp_path):
    file = _file(tmp_path, "q.jsonl", '{"prompt": "\\ud83d"}')
    with pytest.raises(UserError, match=r"q\.jsonl, line 1: prompt: the text has half"):
        read_prompts([file])


def test_a_part_is_spread_over_the_whole_file():
    prompts = [Prompt(str(number)) for number in range(480)]
    chosen = [int(prompt.text) for prompt in evenly_spaced(prompts, 6)]
    assert chosen == [0, 80, 160, 240, 320, 400]
    assert evenly_spaced(prompts[:3], 6) == prompts[:3]


def test_encoding_as_the_server_does_it_and_leaving_out_the_long_ones():
    from transformers import AutoTokenizer

    texts = ["def f(x):", "import os\n" * 40, "class A:"]
    encoded = encode_prompts([Prompt(t, t[:3]) for t in texts], MODEL, 32, chat=False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert [list(ids) for ids in encoded.token_ids] == [
        tokenizer(text)["input_ids"] for text in (texts[0], texts[2])
    ]
    assert encoded.categories == ("def", "cla")
    assert encoded.num_too_long == 1
    assert encoded.stop_token_ids == (1,)


def test_the_chat_template_wraps_prompts():
    (ids,) = encode_prompts([Prompt("Hello")], MODEL, 64, chat=True).token_ids
    (plain,) = encode_prompts([Prompt("Hello")], MODEL, 64, chat=False).token_ids
    assert ids != plain
    assert any(ids[i : i + len(plain)] == plain for i in range(len(ids))), "the text is in it"


def test_encoding_errors(tmp_path):
    with pytest.raises(UserError, match=r"--max-prompt-tokens 1: none of 1 prompts .* Raise it"):
        encode_prompts([Prompt("def f(x): return x")], MODEL, 1, chat=False)
    with pytest.raises(UserError, match=r"--model .*: no tokenizer could be read"):
        encode_prompts([Prompt("a")], str(tmp_path), 1, chat=False)
