# SPDX-License-Identifier: Apache-2.0
"""Catch base checkpoints that a digest would confuse, and one that it would take for two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_layerskip.twins.digest import _PIECE_BYTES, _offsets, checkpoint_digest

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.layers.0.weight": torch.randn(100, 64, generator=generator),
        "model.norm.weight": torch.randn(64, generator=generator),
        "lm_head.weight": torch.randn(32, 64, generator=generator).bfloat16(),
    }


def one_file(folder: Path, values: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(values), folder / "model.safetensors", metadata={"format": folder.name})
    return folder


def shards(folder: Path, values: Mapping[str, torch.Tensor]) -> Path:
    """A file for each tensor, in reverse, and the index."""
    folder.mkdir()
    files = {name: f"model-{n}.safetensors" for n, name in enumerate(reversed(list(values)))}
    for name, file in files.items():
        save_file({name: values[name]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


def test_the_cut_into_files_does_not_matter(tmp_path):
    whole = checkpoint_digest(one_file(tmp_path / "whole", tensors()))
    assert whole is not None
    assert len(whole) == 16
    assert int(whole, 16)
    cut = shards(tmp_path / "cut", tensors())
    assert checkpoint_digest(cut) == whole
    save_file({"other": torch.ones(3)}, cut / "consolidated.safetensors")  # Not in the index.
    assert checkpoint_digest(cut) == whole


def other_value(values):
    values["model.layers.0.weight"] += 0.001


def first_value(values):
    values["model.norm.weight"][0] += 1


def last_value(values):
    values["model.layers.0.weight"][-1, -1] += 1


def other_dtype(values):
    values["lm_head.weight"] = values["lm_head.weight"].half()


def other_shape(values):
    values["model.layers.0.weight"] = values["model.layers.0.weight"].view(64, 100)


def other_name(values):
    values["model.layers.1.weight"] = values.pop("model.layers.0.weight")


def one_less(values):
    del values["lm_head.weight"]


@pytest.mark.parametrize(
    "change",
    [other_value, first_value, last_value, other_dtype, other_shape, other_name, one_less],
)
def test_another_checkpoint_has_another_digest(tmp_path, change):
    before = checkpoint_digest(one_file(tmp_path / "before", tensors()))
    values = tensors()
    change(values)
    assert checkpoint_digest(one_file(tmp_path / "after", values)) != before


def test_two_tensors_that_change_places_are_seen(tmp_path):
    digests = set()
    for order in ((0, 1), (1, 0)):
        values = dict(zip("ab", (torch.full((4,), float(n)) for n in order), strict=True))
        digests.add(checkpoint_digest(one_file(tmp_path / str(order), values)))
    assert len(digests) == 2


@pytest.mark.parametrize("num_values", [0, 1, _PIECE_BYTES - 1, _PIECE_BYTES, 3 * _PIECE_BYTES])
def test_small_tensors_are_read_whole(tmp_path, num_values):
    before = torch.zeros(num_values, dtype=torch.uint8)
    digest = checkpoint_digest(one_file(tmp_path / "before", {"a": before}))
    for index in range(0, num_values, 97):
        after = before.clone()
        after[index] = 1
        assert checkpoint_digest(one_file(tmp_path / "after", {"a": after})) != digest


def test_few_bytes_of_a_large_tensor_are_read(tmp_path, monkeypatch):
    """The cost does not grow with the checkpoint."""
    folder = one_file(tmp_path / "large", {"a": torch.zeros(1 << 22, dtype=torch.uint8)})
    num_bytes = []

    def spied(size):
        offsets = _offsets(size)
        num_bytes.append(len(offsets) * _PIECE_BYTES)
        return offsets

    monkeypatch.setattr("vllm_layerskip.twins.digest._offsets", spied)
    checkpoint_digest(folder)
    assert num_bytes == [8 * _PIECE_BYTES]


def test_without_safetensors_there_is_none(tmp_path):
    assert checkpoint_digest(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert checkpoint_digest(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 40, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"{"],
)
def test_a_damaged_header_is_named(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*again"):
        checkpoint_digest(tmp_path)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    file = one_file(tmp_path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: it ends inside of"):
        checkpoint_digest(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"weight_map": 3}', '{"weight_map": {"a": "gone"}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint_digest(tmp_path)
