# SPDX-License-Identifier: Apache-2.0
"""Catch tokens that count twice or not at all, and text that is not the one named."""

import pytest

from unit.evaluation.tiny_models import save_tokenizer, write_texts
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation import data as evaluation_data
from vllm_layerskip.evaluation.data import Document, cut_windows, encode, read_documents


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_each_token_counts_once_with_all_the_context_there_is(num_tokens, stride):
    stream = list(range(100, 100 + num_tokens))
    windows, scored = cut_windows(stream, 8, stride)
    counted = windows[scored].tolist()
    assert counted == sorted(set(counted)), "a token counts twice, or out of order"
    lacking = set(stream) - set(counted)
    if stride < 8:
        assert lacking == {100}
    else:
        assert lacking == set(stream[::8]), "the first token of each window"
    for row, mask in zip(windows.tolist(), scored.tolist(), strict=True):
        for column in (i for i, counts in enumerate(mask) if counts):
            text = stream[max(0, row[column] - 100 - column) : row[column] - 100 + 1]
            assert row[: column + 1] == text
            assert column >= min(8 - stride, row[column] - 100)
    assert mask[-1] or row[-1] == 0, "only padding is left out at the end"


def test_with_a_token_at_each_windows_head_every_token_counts():
    stream = list(range(100, 120))
    windows, scored = cut_windows(stream, 8, 7, window_bos=5)
    assert windows[:, 0].tolist() == [5, 5, 5]
    assert windows[scored].tolist() == stream
    windows, scored = cut_windows(stream, 8, 3, window_bos=5)
    assert windows[scored].tolist() == stream


def test_documents_are_joined_with_the_tokenizers_own_ends(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "t")
    documents = [Document("1", "ab"), Document("2", "c")]
    a, b, c = tokenizer("abc")["input_ids"]
    assert encode(tokenizer, documents, "document", None).token_ids == [0, a, b, 1, 0, c, 1]
    assert encode(tokenizer, documents, "none", None).token_ids == [a, b, 1, c, 1]
    cut = encode(tokenizer, documents, "document", 3)
    assert (cut.token_ids, cut.num_documents) == ([0, a, b], 1)
    without = save_tokenizer(tmp_path / "u", bos=None, eos=None)
    assert len(encode(without, documents, "none", None).token_ids) == 3
    one, other = (encode(tokenizer, d, "none", None).sha256 for d in (documents, documents[::-1]))
    assert one != other


def test_sources_are_files_folders_lines_and_the_held_out_modules(tmp_path):
    documents = read_documents([str(write_texts(tmp_path / "texts"))], "text")
    assert [d.text for d in documents] == ["abc def ghij\n" * 20, "jihg fed cba", "a b c d e f"]
    modules = read_documents(["stdlib"], "text")
    assert len(modules) > 10
    assert "heapq.py" in {document.name for document in modules}
    (tmp_path / "c.jsonl").write_text('{"content": "x\\u2028y"}\n')
    assert [d.text for d in read_documents([str(tmp_path / "c.jsonl")], "content")] == ["x\u2028y"]


def test_the_stdlib_is_named_where_it_is_missing(monkeypatch):
    def missing():
        raise FileNotFoundError("No Python sources below /x.")

    monkeypatch.setattr(evaluation_data, "load_stdlib", missing)
    with pytest.raises(UserError, match="--data stdlib: No Python sources"):
        read_documents(["stdlib"], "text")
