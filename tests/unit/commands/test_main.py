# SPDX-License-Identifier: Apache-2.0
"""Catch a console script that is slow to start, shows a traceback for a user's mistake or hides
a defect, and a draft vocabulary that does not hold the most frequent tokens."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.commands import COMMANDS
from vllm_layerskip.commands import draft_vocab as command
from vllm_layerskip.commands import main as cli
from vllm_layerskip.config.draft_vocab import read_draft_vocab
from vllm_layerskip.errors import UserError

MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"
VOCAB_SIZE = 1024
SPECIAL = {0, 1, 2}


def _run(*argv):
    return cli.main(["draft-vocab", *map(str, argv)])


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


def test_starting_loads_nothing_heavy():
    heavy = ("vllm", "torch", "transformers", "numpy", "tqdm")
    code = (
        "import sys\nfrom vllm_layerskip.commands.main import build_parser\nbuild_parser()\n"
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["draft-vocab", "--help"]])
def test_help_and_version_end_well(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    output = capsys.readouterr().out
    if argv == ["--version"]:
        assert output.startswith(f"vllm-layerskip {vllm_layerskip.__version__} (vLLM 0.")
    elif argv == ["--help"]:
        assert all(command.name in output for command in COMMANDS)
    else:
        assert f"vllm-layerskip {argv[0]}" in output


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["draft-vocab"], ["draft-vocab", "-x"]])
def test_a_malformed_command_line_ends_with_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: vllm-layerskip" in capsys.readouterr().err


def test_the_script_that_pip_installs_is_this_one():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["vllm-layerskip"].partition(":")
    assert (module, name) == (cli.main.__module__, cli.main.__name__)


def test_a_defect_keeps_its_traceback(monkeypatch, corpus, tmp_path):
    def fail(*_):
        raise ValueError("a defect")

    monkeypatch.setattr(command, "count_tokens", fail)
    with pytest.raises(ValueError, match="a defect"):
        _run("--model", MODEL, "--corpus", corpus, "--size", 9, "--output", tmp_path / "ids")


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


@pytest.mark.parametrize("field", ["text", "content"])
def test_jsonl_texts_are_counted_and_nothing_else(tmp_path, field):
    texts = ["import os", "class Foo:\n    pass\n", ""]
    file = tmp_path / "corpus.jsonl"
    rows = [{field: texts[0], "other": "zzz"}, texts[1], {field: texts[2]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    tokenizer, vocab_size, _ = command.load_tokenizer(str(MODEL))
    counts = command.count_tokens(tokenizer, vocab_size, [file], field)
    assert counts.counted == _expected_counts("import os\nclass Foo:\n    pass\n\n")


def test_every_tenth_passage_is_held_out(tmp_path):
    passage = ("x = 1\n" * command.PASSAGE_CHARS)[: command.PASSAGE_CHARS]
    other = passage.replace("x", "y")
    file = tmp_path / "corpus.txt"
    file.write_text((passage * 9 + other) * 2)
    tokenizer, vocab_size, _ = command.load_tokenizer(str(MODEL))
    counts = command.count_tokens(tokenizer, vocab_size, [file], "text")
    assert counts.num_passages == 20
    (x,), (y,) = tokenizer(["x", "y"]).input_ids
    assert counts.counted[x] > 1000 < counts.held_out[y]
    assert counts.held_out[x] < 20 > counts.counted[y]
    printed = command.report(counts, [x])
    assert f"{command.coverage(counts.counted, [x]):.2f} %" in printed


def test_coverage_is_per_cent_of_occurrences():
    counts = Counter({1: 6, 2: 3, 3: 1})
    assert command.coverage(counts, [1, 3, 9]) == pytest.approx(70)
    assert command.coverage(Counter(), [1]) is None


def test_ties_go_by_id_and_special_tokens_are_always_there():
    counts = Counter({4: 5, 3: 5, 7: 9, 8: 1})
    assert command.most_frequent(counts, 10, 4, [1]) == [7, 3, 4, 1]
    assert command.most_frequent(counts, 10, 4, [7, 8]) == [7, 3, 4, 8]
    assert command.most_frequent(counts, 10, 10, []) == [7, 3, 4, 8, 0, 1, 2, 5, 6, 9]


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
    "corpus is empty": ({"--corpus": _empty_folder}, ("--corpus", "no text file")),
    "corpus has no token": ({"--corpus": lambda t: _file(t, "\n")}, ("--corpus", "no tokens")),
    "corpus is no text": ({"--corpus": _bad_utf8}, ("late.txt", "UTF-8", "leave it out")),
    "line is no JSON": ({"--corpus": lambda t: _file(t, '"a"\n{')}, ("line 2", "no JSON")),
    "line has no text": (
        {"--corpus": lambda t: _file(t, '{"content": "a"}')},
        ("line 1", "'text'", "--text-field"),
    ),
    "size is too small": ({"--size": lambda t: 2}, ("--size 2", "from 3", "to 1024")),
    "size is too large": ({"--size": lambda t: 1025}, ("--size 1025", "from 3", "to 1024")),
    "model is missing": ({"--model": lambda t: t / "no"}, ("--model", "tokenizer's files")),
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


def test_a_tokenizer_of_another_model_is_refused(corpus, tmp_path):
    tokenizer, _, _ = command.load_tokenizer(str(MODEL))
    with pytest.raises(UserError, match=r"token id [0-9]+, but its config.json has vocab_size=50"):
        command.count_tokens(tokenizer, 50, [corpus / "a.py"], "text")
