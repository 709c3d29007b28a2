# SPDX-License-Identifier: Apache-2.0
"""Catch a draft vocabulary that does not hold the most frequent tokens, and a mistake of the user
that ends in a traceback or a half-written file."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.commands import main as cli
from vllm_layerskip.config.draft_vocab import read_draft_vocab
from vllm_layerskip.errors import UserError

MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"
VOCAB_SIZE = 1024
SPECIAL = {0, 1, 2}


def _run(*argv):
    try:
        return cli.main(["draft-vocab", *map(str, argv)])
    except SystemExit as stop:  # argparse's own errors.
        return stop.code


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.py").write_text("import os\nimport sys\n" * 200)
    (folder / "deep" / "b.txt").write_text("def main(argv):\n    return argv\n" * 200)
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    (folder / ".hidden").write_text("zzzz " * 10_000)
    return folder


def _expected_counts(*texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return Counter(token for ids in tokenizer(list(texts)).input_ids for token in ids)


def test_the_most_frequent_tokens_are_chosen(corpus, tmp_path, capsys):
    output = tmp_path / "ids.json"
    assert _run("--model", MODEL, "--corpus", corpus, "--size", 10, "--output", output) == 0
    texts = [(corpus / name).read_text() for name in ("a.py", "deep/b.txt")]
    counts = _expected_counts(*texts)
    common = sorted(set(counts) - SPECIAL, key=lambda token: (-counts[token], token))[:7]
    chosen = json.loads(output.read_text())
    assert set(chosen) == {*common, *SPECIAL}
    assert chosen[:7] == common
    assert read_draft_vocab(output, "", VOCAB_SIZE).token_ids == tuple(sorted(chosen))
    covered = 100 * sum(counts[token] for token in chosen) / counts.total()
    printed = capsys.readouterr().out
    assert f"{covered:.2f} %" in printed
    assert f"--draft-vocab {output}" in printed


def test_the_same_corpus_gives_the_same_file(corpus, tmp_path):
    contents = []
    for _ in range(2):
        output = tmp_path / "ids.json"
        assert _run("--model", MODEL, "--corpus", corpus, "--size", 400, "--output", output) == 0
        contents.append(output.read_bytes())
    assert contents[0] == contents[1]
    chosen = json.loads(contents[0])
    # More ids than the corpus has: the rest is filled up by id.
    unseen = [token for token in chosen if token not in _expected_counts(*_texts_of(corpus))]
    assert unseen == sorted(unseen)
    assert len(set(chosen)) == 400


def _texts_of(corpus):
    return [(corpus / name).read_text() for name in ("a.py", "deep/b.txt")]


def _bad_utf8(tmp_path):
    (tmp_path / "late.txt").write_bytes(b"x" * 9000 + b"\xff")
    return tmp_path / "late.txt"


def _file(tmp_path, content):
    path = tmp_path / "lines.jsonl"
    path.write_text(content)
    return path


def _empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


# Changed arguments, and what the error must say.
MISTAKES = {
    "corpus is missing": ({"--corpus": lambda t: t / "no"}, ("--corpus", "no such file")),
    "corpus is empty": (
        {"--corpus": _empty_folder},
        ("--corpus", "no file in it that can be read"),
    ),
    "corpus has no token": ({"--corpus": lambda t: _file(t, "\n")}, ("--corpus", "no tokens")),
    "corpus is no text": ({"--corpus": _bad_utf8}, ("late.txt", "UTF-8", "leave it out")),
    "line is no JSON": ({"--corpus": lambda t: _file(t, '"a"\n{')}, ("line 2", "no JSON")),
    "line has no text": (
        {"--corpus": lambda t: _file(t, '{"content": "a"}')},
        ("line 1", "'text'", "--text-field"),
    ),
    "size is too small": ({"--size": lambda t: 2}, ("--size 2", "from 3", "to 1024")),
    "size is too large": ({"--size": lambda t: 1025}, ("--size 1025", "from 3", "to 1024")),
    "model is missing": ({"--model": lambda t: t / "no"}, ("--model", "no such folder")),
    "model has no config": ({"--model": lambda t: t}, ("--model", "config.json")),
    "output is a folder": ({"--output": lambda t: t}, ("--output", "must be a file")),
    "output has no folder": ({"--output": lambda t: t / "no" / "f"}, ("--output", "exists")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_in_one_line(corpus, tmp_path, capsys, mistake):
    changes, says = MISTAKES[mistake]
    output = tmp_path / "ids.json"
    argv = {"--model": MODEL, "--corpus": corpus, "--size": 9, "--output": output}
    argv |= {name: make(tmp_path) for name, make in changes.items()}
    assert _run(*(item for pair in argv.items() for item in pair)) == 2
    (message,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-layerskip")
    ]
    assert message.startswith("vllm-layerskip draft-vocab: error: ")
    for words in says:
        assert words in message
    assert not output.exists()


def test_a_folder_that_cannot_be_written_is_explained(corpus, tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    args = cli.build_parser().parse_args(
        f"draft-vocab --model {MODEL} --corpus {corpus} --size 9 --output {tmp_path}/ids".split()
    )
    with pytest.raises(UserError, match="Permission denied"):
        args.run(args)
