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
    assert read_prompts(path) == [Prompt("Write.", "writing"), Prompt("Who?", "qa")]


def test_only_the_first_turn_must_be_a_text(tmp_path):
    assert read_prompts(_file(tmp_path, "q.jsonl", '{"turns": ["Write.", 3]}')) == [
        Prompt("Write.")
    ]


def test_json_lines_and_plain_lines(tmp_path):
    lines = '"a string"\n\n{"prompt": "two\\nlines"}\n{"text": "t", "category": 3}\n'
    assert [p.text for p in read_prompts(_file(tmp_path, "p.jsonl", lines))] == [
        "a string", "two\nlines", "t"
    ]  # fmt: skip
    plain = read_prompts(_file(tmp_path, "p.txt", "one\n\n{two}\n"))
    assert plain == [Prompt("one"), Prompt("{two}")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", None, ("No such file", "readable file")),
        ("p.txt", "", ("there is no prompt in it",)),
        ("p.txt", " \n\n", ("there is no prompt in it",)),
        ("p.jsonl", "", ("there is no prompt in it",)),
        ("p.txt", b"\xff\xfe\x00", ("no UTF-8 text", "Convert")),
        ("p.jsonl", '{"prompt": "a"}\n{oops\n', ("line 2", "no JSON", ".txt")),
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
        read_prompts(path)
    for words in (f"--prompts {path}", *says):
        assert words in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(tmp_path)


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
