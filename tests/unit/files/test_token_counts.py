# SPDX-License-Identifier: Apache-2.0
"""Catch tokens that are counted wrong, and a choice that leaves out a frequent or special one."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.token_counts import (
    PASSAGE_CHARS,
    Vocabulary,
    count_tokens,
    coverage,
    coverage_table,
    load_vocabulary,
    most_frequent,
)

MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"


def _expected_counts(*texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return Counter(token for ids in tokenizer(list(texts)).input_ids for token in ids)


@pytest.mark.parametrize("field", ["text", "content"])
def test_jsonl_texts_are_counted_and_nothing_else(tmp_path, field):
    texts = ["import os", "class Foo:\n    pass\n", ""]
    file = tmp_path / "corpus.jsonl"
    rows = [{field: texts[0], "other": "zzz"}, texts[1], {field: texts[2]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    counts = count_tokens(load_vocabulary(str(MODEL)), [file], field)
    assert counts.counted == _expected_counts("import os\nclass Foo:\n    pass\n\n")


def test_every_tenth_passage_is_held_out(tmp_path):
    passage = ("x = 1\n" * PASSAGE_CHARS)[:PASSAGE_CHARS]
    other = passage.replace("x", "y")
    file = tmp_path / "corpus.txt"
    file.write_text((passage * 9 + other) * 2)
    vocabulary = load_vocabulary(str(MODEL))
    counts = count_tokens(vocabulary, [file], "text")
    assert counts.num_passages == 20
    (x,), (y,) = vocabulary.tokenizer(["x", "y"]).input_ids
    assert counts.counted[x] > 1000 < counts.held_out[y]
    assert counts.held_out[x] < 20 > counts.counted[y]
    printed = coverage_table(counts, [x])
    assert f"{coverage(counts.counted, [x]):.2f} %" in printed
    assert "No text is held out" not in printed


def test_a_corpus_too_small_to_hold_text_out_says_so(tmp_path):
    (tmp_path / "a.py").write_text("import os\n")
    counts = count_tokens(load_vocabulary(str(MODEL)), [tmp_path / "a.py"], "text")
    *_, row, reason = coverage_table(counts, [1]).splitlines()
    assert row.endswith(" -")
    assert "No text is held out: of each 10 passages" in reason
    assert "the corpus has 1. Give more text" in reason


def test_coverage_is_per_cent_of_occurrences():
    counts = Counter({1: 6, 2: 3, 3: 1})
    assert coverage(counts, [1, 3, 9]) == pytest.approx(70)
    assert coverage(Counter(), [1]) is None


def test_ties_go_by_id_and_special_tokens_are_always_there():
    counts = Counter({4: 5, 3: 5, 7: 9, 8: 1})
    assert most_frequent(counts, Vocabulary(None, 10, [1]), 4) == [7, 3, 4, 1]
    assert most_frequent(counts, Vocabulary(None, 10, [7, 8]), 4) == [7, 3, 4, 8]
    assert most_frequent(counts, Vocabulary(None, 10, []), 10) == [7, 3, 4, 8, 0, 1, 2, 5, 6, 9]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("import os\n")
    smaller = replace(load_vocabulary(str(MODEL)), size=50)
    with pytest.raises(UserError, match=r"token id [0-9]+, but its config.json has vocab_size=50"):
        count_tokens(smaller, [tmp_path / "a.py"], "text")
