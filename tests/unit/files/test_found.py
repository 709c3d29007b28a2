# SPDX-License-Identifier: Apache-2.0
"""Catch files that are read though nobody named them, and files that are left out in silence."""

from pathlib import Path

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.found import format_of, record_files

FILES = ("a.jsonl", "parts/1/p.jsonl", "parts/2/p.jsonl", "parts/2/q.parquet", "parts/2/deep/p.txt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in (*FILES, ".hidden.jsonl", "parts/2/._p.jsonl", ".cache/c.jsonl", "parts/1/t.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*paths):
    return [file.as_posix() for file in record_files(paths, "--input")]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl", ["a.jsonl"]),
        (Path("a.jsonl"), ["a.jsonl"]),
        (".", sorted(FILES)),
        ("parts/*/p.jsonl", ["parts/1/p.jsonl", "parts/2/p.jsonl"]),
        ("parts/**/p.*", ["parts/1/p.jsonl", "parts/2/deep/p.txt", "parts/2/p.jsonl"]),
        ("parts/2/*", ["parts/2/deep/p.txt", "parts/2/p.jsonl", "parts/2/q.parquet"]),
        ("parts/2/**", ["parts/2/deep/p.txt", "parts/2/p.jsonl", "parts/2/q.parquet"]),
        ("parts/[2]/p.jsonl", ["parts/2/p.jsonl"]),
        (".hidden.jsonl", [".hidden.jsonl"]),
    ],
)
def test_files_folders_and_patterns(folder, path, expected):
    assert sorted(found(path)) == sorted(expected)
    assert found(path) == found(path), "the order is fixed"


def test_a_file_that_exists_is_no_pattern(folder):
    (folder / "prompts [v1].jsonl").touch()
    (folder / "prompts v.jsonl").touch()
    assert found("prompts [v1].jsonl") == ["prompts [v1].jsonl"]
    (folder / "set[1]").mkdir()
    (folder / "set[1]/x.txt").touch()
    assert found("set[1]") == ["set[1]/x.txt"]


def test_a_pattern_below_a_folder_with_signs_in_its_name(folder):
    (folder / "set [1]").mkdir()
    (folder / "set [1]/x.txt").touch()
    for path in ("set [1]/*.txt", "set [1]/**", str(folder / "set [1]/*")):
        assert [Path(file).name for file in found(path)] == ["x.txt"]


def test_a_file_counts_once(folder):
    assert found("a.jsonl", "*.jsonl", "parts/**/*.txt", "parts") == sorted(FILES)[:1] + [
        "parts/2/deep/p.txt", "parts/1/p.jsonl", "parts/2/p.jsonl", "parts/2/q.parquet"
    ]  # fmt: skip


def test_all_of_a_folder_is_as_the_folder(folder, caplog):
    """Of ``**`` a file of another format is left out, and no error."""
    assert found("parts/**") == found("parts")


@pytest.mark.parametrize("path", ["", "x" * 300, "Write a story. " * 300], ids=["", "x", "story"])
def test_what_can_be_no_path_is_named_in_short(folder, path):
    with pytest.raises(UserError, match=r"^--input .{0,90}: ") as error:
        found(path)
    assert len(str(error.value)) < 300


def test_a_folder_says_what_it_leaves_out(folder, caplog):
    found("parts/1")
    assert "1 file(s) of unknown formats are left out, t.csv first" in caplog.text


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("none.jsonl", "there is no such file or folder"),
        ("parts/*.jsonl", "no file matches"),
        ("parts/1/t.csv", "unknown format"),
        ("parts/1/t.*", "unknown format"),
        ("empty", "there is no file in it that can be read"),
    ],
)
def test_what_names_no_readable_file_is_an_error(folder, path, says):
    (folder / "empty").mkdir()
    (folder / "empty/table.csv").touch()
    with pytest.raises(UserError) as error:
        found("a.jsonl", path)
    assert str(error.value).startswith("--input ")
    assert says in str(error.value)
    assert ".parquet" in str(error.value), "it names what can be read"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ".jsonl"),
        ("A.JSONL", ".jsonl"),
        ("a.b.ndjson.gz", ".ndjson"),
        ("a.txt.GZ", ".txt"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.csv", None),
        ("a.jsonl.zst", None),
        ("jsonl", None),
        (".jsonl", None),
        ("README", None),
    ],
)
def test_the_end_of_a_name_is_the_format(name, expected):
    assert format_of(Path(name)) == expected
