# SPDX-License-Identifier: Apache-2.0
"""Catch a damaged checkpoint before an engine starts, by a message that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_layerskip.config.weight_files import INDEX_NAME, check_weight_files, missing_weights

REQUEST = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    weight_map = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"tensor{number}": torch.ones(64)}, tmp_path / name)
        weight_map[f"tensor{number}"] = name
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def second(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def test_whole_files_pass(folder, tmp_path_factory):
    check_weight_files(folder)
    (folder / INDEX_NAME).unlink()
    check_weight_files(folder)
    check_weight_files(tmp_path_factory.mktemp("none"))  # A model of the hub, or dummy weights.


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def cut_in_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def other_bytes(file: Path) -> None:
    file.write_bytes(b"\xff" * 300)


@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no-index"])
@pytest.mark.parametrize("damage", [cut, cut_in_header, empty, other_bytes])
def test_a_damaged_file_is_named(folder, damage, with_index):
    if not with_index:
        (folder / INDEX_NAME).unlink()
    damage(second(folder))
    with pytest.raises(ValueError, match="cannot be read") as error:
        check_weight_files(folder)
    assert str(second(folder)) in str(error.value)
    assert "again" in str(error.value)


def test_a_missing_shard_is_named(folder):
    second(folder).unlink()
    with pytest.raises(ValueError, match="cannot be read") as error:
        check_weight_files(folder)
    assert str(second(folder)) in str(error.value)


def test_a_file_that_the_index_leaves_out_does_not_matter(folder):
    (folder / "consolidated.safetensors").write_bytes(b"")
    check_weight_files(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_a_damaged_index_is_named(folder, content):
    (folder / INDEX_NAME).write_text(content)
    with pytest.raises(ValueError, match="index of weight files") as error:
        check_weight_files(folder)
    assert str(folder / INDEX_NAME) in str(error.value)


def test_an_engine_that_asks_for_layerskip_is_checked(engine_config, checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    save_file({"tensor": torch.ones(64)}, model / "model.safetensors")
    cut(model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        engine_config(dict(REQUEST), model=str(model))
    engine_config(model=str(model))
    engine_config(dict(REQUEST), model=str(model), load_format="dummy")


PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
PARAMETERS = ("model.norm.weight", "model.layers.0.attn.qkv_proj.weight", "lm_head.weight")
CHECKPOINT = {
    "model.norm.weight",
    "lm_head.weight",
    *(f"model.layers.0.attn.{part}.weight" for part in PACKED["qkv_proj"]),
}


def test_a_whole_checkpoint_lacks_nothing():
    assert missing_weights(PARAMETERS, PACKED, set(PARAMETERS), CHECKPOINT) == []
    # Fused in the checkpoint already.
    assert missing_weights(PARAMETERS, PACKED, set(PARAMETERS), set(PARAMETERS)) == []


@pytest.mark.parametrize("name", sorted(CHECKPOINT))
def test_a_weight_that_is_missing_is_named_as_in_the_checkpoint(name):
    names = CHECKPOINT - {name}
    loaded = {parameter for parameter in PARAMETERS if parameter in names or "qkv" in parameter}
    assert missing_weights(PARAMETERS, PACKED, loaded, names) == [name]


def test_all_parts_of_a_fused_weight_may_be_missing():
    names = {name for name in CHECKPOINT if "attn" not in name}
    assert missing_weights(PARAMETERS, PACKED, names, names) == [
        f"model.layers.0.attn.{part}.weight" for part in PACKED["qkv_proj"]
    ]
