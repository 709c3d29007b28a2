# SPDX-License-Identifier: Apache-2.0
"""Catch training samples that lose, repeat or mix up text."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unit.training.training_runs import TEXTS, write_tokenizer
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.config import DataConfig, Source
from vllm_layerskip.training.data import (
    Collator,
    load_samples,
    pack,
    tokenizer_fingerprint,
    truncate,
)
from vllm_layerskip.training.encoder import Encoded, Encoder

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(tokenizer, files, **settings):
    data = DataConfig(train=Source(files=tuple(map(str, files))), **{"seq_len": 16} | settings)
    return load_samples(data.train, data, tokenizer, "data.train")


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stream(dataset):
    return [token for sample in dataset for token in sample["input_ids"]]


# --- Packing


_documents = st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=20), max_size=12)


@given(_documents, st.integers(2, 9))
def test_packing_keeps_every_token_in_order_up_to_the_ragged_end(documents, seq_len):
    whole = [token for document in documents for token in document]
    blocks = list(pack((Encoded(d, d) for d in documents), seq_len))
    assert all(len(block.input_ids) == seq_len for block in blocks)
    assert [t for block in blocks for t in block.input_ids] == whole[: len(blocks) * seq_len]
    assert len(whole) - len(blocks) * seq_len < seq_len
    assert all(block.input_ids == block.labels for block in blocks)


def test_blocks_and_documents_without_a_target_are_left_out():
    masked, trained = Encoded([1] * 4, [-100] * 4), Encoded([2] * 4, [-100, 2, 2, 2])
    first_only = Encoded([3] * 4, [3, -100, -100, -100])  # Nothing predicts a first token.
    documents = [masked, trained, first_only]
    assert list(pack(documents, 4)) == [trained]
    assert list(truncate(documents, 4)) == [trained]


def test_without_packing_each_document_is_a_sample_of_its_own(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["import os", "import sys\n" * 20])
    first, second = load(tokenizer, [file], packing=False)
    assert tokenizer.decode(first["input_ids"]) == "import os</s>"
    assert len(second["input_ids"]) == 16


# --- Sources


def test_texts_are_separated_by_the_end_token_and_nothing_else(tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text("import sys\n" * 4)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "import os\n" * 3}, "x = 1\n" * 9])
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "weights.bin").write_bytes(b"\xff\0")
    dataset = load(tokenizer, [tmp_path], seq_len=4)
    text = tokenizer.decode(stream(dataset))
    expected = "import os\n" * 3 + "</s>" + "x = 1\n" * 9 + "</s>" + "import sys\n" * 4 + "</s>"
    assert expected.startswith(text)
    assert len(text) > 0.9 * len(expected)


def test_the_same_input_is_encoded_once_and_a_changed_one_again(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(TEXTS[0])
    calls = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *a: calls.append(1) or encode(*a))
    first = stream(load(tokenizer, [file]))
    assert stream(load(tokenizer, [file])) == first
    assert len(calls) == 1
    file.write_text(TEXTS[1] + TEXTS[2])
    assert stream(load(tokenizer, [file])) != first
    load(tokenizer, [file], seq_len=8)
    assert len(calls) == 3


def test_a_dataset_saved_to_disk_is_read(tokenizer, tmp_path):
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list([{"text": text} for text in TEXTS])
    dataset.save_to_disk(tmp_path / "flat")
    DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(tmp_path / "d")
    sizes = []
    for source in (
        Source(dataset=str(tmp_path / "flat")),
        Source(dataset=str(tmp_path / "d")),
        Source(dataset=str(tmp_path / "d"), split="test"),
    ):
        data = DataConfig(train=source, seq_len=16)
        sizes.append(len(load_samples(source, data, tokenizer, "data.train")))
    assert sizes[0] == sizes[1] > 5 * sizes[2] > 0


def test_a_folder_of_jsonl_is_read_through_load_dataset(tokenizer, tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"body": text} for text in TEXTS[:4]])
    source = Source(dataset=str(tmp_path / "set"))
    data = DataConfig(train=source, seq_len=16, text_field="body")
    assert tokenizer.decode(stream(load_samples(source, data, tokenizer, "data.train"))).startswith(
        TEXTS[0]
    )


def test_max_samples_takes_the_first(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = Source(files=(str(file),), max_samples=3)
    data = DataConfig(train=source, seq_len=16)
    few = load_samples(source, data, tokenizer, "data.train")
    assert stream(few) == stream(load(tokenizer, [file]))[: 3 * 16]


def test_the_standard_library_is_there_without_its_held_out_modules(tokenizer):
    sources = [Source(python_stdlib=part) for part in ("held_out", "train")]
    data = DataConfig(train=sources[0], seq_len=512)
    dataset = load_samples(sources[0], data, tokenizer, "data.train")
    assert len(dataset) > 100
    assert "bisect" in tokenizer.decode(dataset[0]["input_ids"])


# --- Batches


def test_shorter_samples_are_padded_without_a_loss():
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=2)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in Collator(2)(samples[:1] * 2)


# --- Mistakes


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "a.jsonl, line 2: there is no text in 'text'",
        ),
        ("a.jsonl", b'{"text": 3}\n', "line 1: there is no text"),
        ("a.jsonl", b"[1]\n", "line 1: there is no text"),
        ("a.jsonl", b"{text}\n", "line 1: this is no JSON"),
        ("a.txt", b"\xff\xfe\x00", "a.txt: this is no UTF-8 text. Convert it, or leave it out"),
        ("a.txt", b"", "data.train: it holds less than data.seq_len=16 tokens"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "line 1: message 1: it must be"),
        (None, b"", "there is no file in it that can be read"),
    ],
)
def test_unusable_files_are_named(tokenizer, tmp_path, name, content, expected):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load(tokenizer, [tmp_path / name if name else tmp_path])


def test_missing_sources_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="data.train.files .*none: there is no such file or folder"):
        load(tokenizer, [tmp_path / "none"])
    source = Source(dataset=str(tmp_path / "none"))
    with pytest.raises(UserError, match="data.train.dataset: .*could not be loaded"):
        load_samples(source, DataConfig(train=source), tokenizer, "data.train")


def test_another_token_that_the_template_prints_is_another_tokenizer(tokenizer):
    """Samples of a cache begin with the token that the template wrote then."""
    other = copy.deepcopy(tokenizer)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.bos_token = "<think>"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
