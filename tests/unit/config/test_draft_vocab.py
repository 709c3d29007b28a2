# SPDX-License-Identifier: Apache-2.0
"""Catch a bad file of token ids that reaches the engine, a good one that is refused, and a
draft vocabulary that is not the one that was asked for."""

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.config.draft_vocab import (
    MAX_FILE_BYTES,
    parse_draft_vocab,
    read_draft_vocab,
    write_token_ids,
)
from vllm_layerskip.config.options import OptionPath, resolve_options

VOCAB_SIZE = 128  # As in conftest.py's checkpoint.
REQUEST = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
REMEDIES = ("vllm-layerskip draft-vocab", "draft_vocab='none'")

# A file's content, and what the error must say.
BAD = [
    (b"", ("no token id",)),
    (b" \n\n", ("no token id",)),
    (b"[]", ("no token id",)),
    (b"[1, 2", ("no valid JSON", "JSON array of token ids, or one id a line")),
    (b"[" * 100_000, ("no valid JSON",)),
    (b'{"token_ids": [1]}', ("no JSON array",)),
    (b'"1"', ("no JSON array",)),
    (b"[1, 2.0]", ("entry 1 is 2.0", "no integer")),
    (b'[1, 2, "3"]', ("entry 2 is '3'", "no integer")),
    (b"[true]", ("entry 0 is True", "no integer")),
    (b"[[1, 2]]", ("entry 0 is [1, 2]", "no integer")),
    (b"[null]", ("entry 0 is None", "no integer")),
    (b"1\n2\nthree\n", ("line 3 is 'three'", "no integer")),
    (b"1\n\n2.5\n", ("line 3 is '2.5'", "no integer")),
    (b"1_0\n", ("line 1 is '1_0'", "no integer")),
    (b"1 2 3\n", ("line 1 is '1 2 3'", "no integer")),
    (b"9" * 30, ("line 1 is", "no integer")),
    ("\u0663\n".encode(), ("line 1 is", "no integer")),
    (b"\x80\x04\x95\x0b", ("no text", "JSON array of token ids, or one id a line")),
    (b"[5, -1]", ("token id -1 is not in the model's vocabulary", "0 to 127", "tokenizer")),
    (b"-1\n", ("token id -1 is not in the model's vocabulary", "0 to 127", "tokenizer")),
    (b"[127, 128]", ("token id 128 is not in the model's vocabulary", "0 to 127", "tokenizer")),
    (b"[3, 5, 3]", ("token id 3 is there more than once", "List every id once")),
]


def _file(tmp_path, content):
    path = tmp_path / "ids"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("content", "says"), BAD, ids=lambda value: repr(value)[:40])
def test_a_bad_file_is_refused_with_the_place_and_a_remedy(tmp_path, content, says):
    path = _file(tmp_path, content)
    with pytest.raises(ValueError, match="^the option: ") as error:
        read_draft_vocab(path, "the option", VOCAB_SIZE)
    for words in says + REMEDIES:
        assert words in str(error.value)
    assert len(str(error.value)) < 500


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path, says in ((tmp_path / "missing", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=says) as error:
            read_draft_vocab(path, "the option", VOCAB_SIZE)
        assert all(words in str(error.value) for words in REMEDIES)


def test_weights_given_by_mistake_are_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        os.truncate(file.fileno(), MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match=f"{MAX_FILE_BYTES + 1} bytes, at most {MAX_FILE_BYTES}"):
        read_draft_vocab(path, "the option", VOCAB_SIZE)


@pytest.mark.parametrize(
    "content",
    [
        b"[7, 0, 127]",
        b" [7,\n0,\n127]\n",
        b"7\n0\n127",
        b"\n 127 \r\n0\r\n\r\n7\r\n",
        b"\xef\xbb\xbf7\n0\n127\n",
    ],
)
def test_both_formats_give_the_ids_in_ascending_order(tmp_path, content):
    vocab = read_draft_vocab(_file(tmp_path, content), "the option", VOCAB_SIZE)
    assert vocab.token_ids == (0, 7, 127)
    assert len(vocab) == 3


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, unique=True))
def test_any_set_of_ids_of_the_vocabulary_is_accepted_in_any_order(token_ids):
    lines = "\n".join(map(str, token_ids)).encode()
    for content in (lines, json.dumps(token_ids).encode()):
        vocab = parse_draft_vocab(content, "here", VOCAB_SIZE)
        assert vocab.token_ids == tuple(sorted(token_ids))


def test_what_is_written_can_be_read_and_replaces_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "ids.json"
    write_token_ids(path, [5, 3])
    assert read_draft_vocab(path, "", VOCAB_SIZE).token_ids == (3, 5)

    def fail(*_):
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk"):
            write_token_ids(path, [1])
    assert json.loads(path.read_text()) == [5, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["ids.json"], "something was left behind"


GOOD_FILE, BLOCK_FILE = OptionPath("a.json", False), OptionPath("b.json", True)


@pytest.mark.parametrize(
    ("request_", "block", "expected"),
    [
        ({}, None, None),
        ({}, {"draft_vocab": None}, None),
        ({"draft_vocab": "none"}, None, None),
        ({"draft_vocab": "a.json"}, None, GOOD_FILE),
        ({"draft_vocab": "a.json"}, {"draft_vocab": "b.json"}, GOOD_FILE),
        ({"draft_vocab": "a.json"}, {"draft_vocab": 5}, GOOD_FILE),
        ({}, {"draft_vocab": "b.json"}, BLOCK_FILE),
        ({"draft_vocab": None}, {"draft_vocab": "b.json"}, BLOCK_FILE),
        ({"draft_vocab": "auto"}, {"draft_vocab": "b.json"}, BLOCK_FILE),
        ({"draft_vocab": "none"}, {"draft_vocab": "b.json"}, None),
        ({"draft_vocab": "none"}, {"draft_vocab": 5}, None),
    ],
)
def test_the_request_goes_before_the_checkpoints_block(request_, block, expected):
    assert resolve_options(REQUEST | request_, 4, block).draft_vocab == expected


@pytest.mark.parametrize("value", [True, 3, [1, 2], {"path": "a"}, b"a.json", ""])
def test_a_request_that_is_no_path_is_refused(value):
    with pytest.raises(ValueError, match="speculative_config: draft_vocab=") as error:
        resolve_options(REQUEST | {"draft_vocab": value}, 4, None)
    for words in (repr(value), "path of a file of token ids", "'auto'", "'none'"):
        assert words in str(error.value)


@pytest.mark.parametrize("value", [True, 3, [1, 2], "", "/etc/passwd", "../ids", "a/../../ids"])
def test_a_checkpoint_names_a_file_of_its_own_folder_only(value):
    with pytest.raises(ValueError, match=r"config.json, 'layerskip' block: draft_vocab=") as error:
        resolve_options(REQUEST, 4, {"draft_vocab": value})
    for words in (repr(value), "inside the checkpoint's folder", "--draft-vocab none"):
        assert words in str(error.value)


@pytest.fixture
def ids_file(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text("[5, 3, 100]")
    return path


def _config_of(engine_config, draft_vocab, **settings):
    request = REQUEST | {"draft_vocab": draft_vocab}
    return engine_config(request, **settings).speculative_config


def test_the_ids_reach_the_config_and_other_processes(engine_config, ids_file, monkeypatch):
    monkeypatch.chdir(ids_file.parent)
    for draft_vocab in (str(ids_file), ids_file, "ids.json"):
        config = _config_of(engine_config, draft_vocab)
        assert config.draft_vocab.token_ids == (3, 5, 100)
        assert "draft_vocab=3 token ids" in repr(config)
    ids_file.unlink()  # The other process may run where there is no such file.
    sent = pickle.loads(pickle.dumps(config))
    assert sent.draft_vocab == config.draft_vocab
    assert sent.compute_hash() == config.compute_hash()


@pytest.fixture
def checkpoint_with_ids(checkpoint, tmp_path):
    """A copy of the checkpoint that names a draft vocabulary in its config.json."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    config["layerskip"] = {"draft_vocab": "draft_vocab.txt"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "draft_vocab.txt").write_text("7\n8\n")
    return folder


def test_a_checkpoint_brings_its_draft_vocabulary(engine_config, checkpoint_with_ids, ids_file):
    model = {"model": str(checkpoint_with_ids), "tokenizer": str(checkpoint_with_ids)}
    assert engine_config(dict(REQUEST), **model).speculative_config.draft_vocab.token_ids == (7, 8)
    assert _config_of(engine_config, "auto", **model).draft_vocab.token_ids == (7, 8)
    assert _config_of(engine_config, "none", **model).draft_vocab is None
    assert _config_of(engine_config, ids_file, **model).draft_vocab.token_ids == (3, 5, 100)
    (checkpoint_with_ids / "draft_vocab.txt").unlink()
    with pytest.raises(ValueError, match="No such file") as error:
        engine_config(dict(REQUEST), **model)
    assert "config.json, 'layerskip' block: draft_vocab='draft_vocab.txt'" in str(error.value)


def test_ids_of_another_model_end_the_start_before_any_weight_is_read(engine_config, tmp_path):
    path = tmp_path / "ids.json"
    path.write_text("[3, 500]")
    with pytest.raises(ValueError, match="token id 500 is not in the model's vocabulary") as error:
        _config_of(engine_config, path)
    assert f"speculative_config: draft_vocab={str(path)!r}" in str(error.value)


def test_a_checkpoint_on_a_hub_is_asked_for_the_file(engine_config, monkeypatch):
    from vllm_layerskip.config import layerskip_config as config_module

    model_config = engine_config().model_config
    model_config.model, model_config.revision = "org/model", "a-revision"
    asked = []

    def get_hf_file_bytes(*args):
        asked.append(args)
        return content

    monkeypatch.setattr(config_module, "get_hf_file_bytes", get_hf_file_bytes)
    content = b"[1, 2]"
    vocab = config_module._read_draft_vocab(BLOCK_FILE, model_config)
    assert vocab.token_ids == (1, 2)
    assert asked == [("b.json", "org/model", "a-revision")]
    content = None
    with pytest.raises(ValueError, match="'org/model' has no such file"):
        config_module._read_draft_vocab(BLOCK_FILE, model_config)
