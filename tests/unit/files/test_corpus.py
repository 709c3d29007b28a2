# SPDX-License-Identifier: Apache-2.0
"""Catch held-out text that is trained on, and two corpora that look the same."""

import pytest

from vllm_layerskip.files.corpus import HELD_OUT_MODULES, Corpus, held_out_prompts, load_stdlib


@pytest.fixture
def library(tmp_path):
    """A small standard library: two held-out modules, two others, and what is skipped."""
    lines = {
        "bisect.py": [f"bisect_{i} = {i}\n" for i in range(200)],
        "json/encoder.py": [f"encoder_{i} = {i}\n" for i in range(120)],
        "json/decoder.py": [f"decoder_{i} = {i}\n" for i in range(400)],
        "abc.py": [f"abc_{i} = {i}\n" for i in range(400)],
        "test/bisect.py": ["skipped = 1\n"],
        "site-packages/numpy/core.py": ["skipped = 1\n"],
        "idlelib/idle_test/mock.py": ["skipped = 1\n"],
    }
    for name, content in lines.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(content))
    (tmp_path / "lib" / "latin.py").write_bytes(b"name = '\xe9'\n")
    return tmp_path / "lib"


def test_held_out_modules_are_not_trained_on_and_skipped_folders_not_read(library):
    corpus = load_stdlib(library)
    assert set(corpus.train) == {"abc.py", "json/decoder.py"}
    assert set(corpus.held_out) == {"bisect.py", "json/encoder.py"}
    assert corpus.train["abc.py"] == (library / "abc.py").read_text()


def test_prompts_are_cut_from_held_out_modules_in_turn(library):
    corpus = load_stdlib(library)
    prompts = held_out_prompts(corpus, 4, num_lines=10, max_chars=100)
    assert [name for name, _ in prompts] == ["bisect.py", "json/encoder.py"] * 2
    assert len({text for _, text in prompts}) == 4
    for name, text in prompts:
        assert 0 < len(text) <= 100
        assert text in corpus.held_out[name]
        assert not corpus.held_out[name].startswith(text)


def test_no_prompt_occurs_anywhere_in_the_real_training_text():
    corpus = load_stdlib()
    assert not set(HELD_OUT_MODULES) & set(corpus.train)
    assert len(corpus.held_out) >= len(HELD_OUT_MODULES) - 1
    prompts = held_out_prompts(corpus, 48)
    assert len(prompts) == 48
    assert len({name for name, _ in prompts[:16]}) == 16
    training_text = "".join(corpus.train.values())
    assert [name for name, text in prompts if text in training_text] == []


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Install the full standard library") as error:
        load_stdlib(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_digest_tells_any_two_corpora_apart():
    corpora = [
        Corpus({"a.py": "x"}, {"b.py": "y"}),
        Corpus({"a.py": "x"}, {"b.py": "z"}),
        Corpus({"a.py": "y"}, {"b.py": "x"}),
        Corpus({"b.py": "x"}, {"a.py": "y"}),
        Corpus({"a.py": "x", "b.py": "y"}, {"c.py": "z"}),
    ]
    assert len({corpus.digest for corpus in corpora}) == len(corpora)
    same = Corpus({"b.py": "y", "a.py": "x"}, {"c.py": "z"})
    assert same.digest == corpora[-1].digest
