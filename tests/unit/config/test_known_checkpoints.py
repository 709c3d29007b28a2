# SPDX-License-Identifier: Apache-2.0
"""Catch a published checkpoint that gets no default, another model that gets one, and a default
that an engine does not take or does not mention."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from vllm_layerskip.config.known_checkpoints import KNOWN_CHECKPOINTS, find_known_checkpoint
from vllm_layerskip.config.options import resolve_options

# The checkpoints of Meta's collection, and their layers as their config.json has them.
PUBLISHED = {
    "layerskip-llama2-7B": 32,
    "layerskip-llama2-13B": 40,
    "layerskip-llama2-70B": 80,
    "layerskip-codellama-7B": 32,
    "layerskip-codellama-34B": 48,
    "layerskip-llama3-8B": 32,
    "layerskip-llama3.2-1B": 16,
}


def test_every_published_checkpoint_is_known():
    assert {known.name: known.num_layers for known in KNOWN_CHECKPOINTS} == PUBLISHED


@pytest.mark.parametrize("known", KNOWN_CHECKPOINTS, ids=lambda known: known.name)
def test_its_values_pass_for_a_block_of_the_checkpoint_and_name_their_source(known):
    options = resolve_options({"model": "[self]"}, known.num_layers, known.block)
    assert options.exit_layer == known.exit_layer
    assert options.num_speculative_tokens == known.num_speculative_tokens
    assert known.source


@pytest.mark.parametrize(
    "model",
    [
        "facebook/layerskip-llama2-7B",
        "facebook/LayerSkip-Llama2-7b",
        "{tmp}/layerskip-llama2-7B",
        "{tmp}/LAYERSKIP-LLAMA2-7B/",
        "{tmp}/models--facebook--layerskip-llama2-7B/snapshots/0a1b",
    ],
)
def test_names_that_mean_it(model, tmp_path):
    folder = model.format(tmp=tmp_path)
    if folder != model:
        Path(folder).mkdir(parents=True)
    known = find_known_checkpoint(folder, 32)
    assert known is not None
    assert (known.name, known.exit_layer, known.num_speculative_tokens) == (
        "layerskip-llama2-7B", 8, 6
    )  # fmt: skip
    assert find_known_checkpoint(folder, 4) is None, "another model of that name"


@pytest.mark.parametrize(
    "model",
    [
        "somebody/layerskip-llama2-7B",
        "facebook/layerskip-llama2-7B-instruct",
        "facebook/llama2-7B",
        "layerskip-llama2-7B",
        "facebook/",
        "",
        "{tmp}/layerskip-llama2-7B-mine",
    ],
)
def test_names_that_do_not(model, tmp_path):
    folder = model.format(tmp=tmp_path)
    if folder != model:
        Path(folder).mkdir(parents=True)
    assert find_known_checkpoint(folder, 32) is None


@pytest.fixture
def published(engine_config, checkpoint, tmp_path):
    """A folder like a published checkpoint's of 16 layers: its name, and no block."""
    engine_config()  # The first one sets all log levels and handlers anew.
    folder = tmp_path / "layerskip-llama3.2-1B"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 16
    config.pop("layerskip", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("request_", "expected", "logged"),
    [
        ({}, (4, 4), "exit_layer=4 and num_speculative_tokens=4, known for"),
        ({"exit_layer": "auto", "num_speculative_tokens": 2}, (4, 2), "using exit_layer=4, known"),
        ({"exit_layer": 7}, (7, 4), "using num_speculative_tokens=4, known"),
        ({"exit_layer": 7, "num_speculative_tokens": 2}, (7, 2), None),
    ],
    ids=repr,
)
def test_an_engine_uses_them_and_says_so(
    engine_config, published, layerskip_log, request_, expected, logged
):
    with layerskip_log.at_level(logging.INFO, "vllm.layerskip.config"):
        config = engine_config(
            {"method": "layerskip"} | request_, model=str(published), tokenizer=str(published)
        ).speculative_config
    assert (config.exit_layer, config.num_speculative_tokens) == expected
    if logged is None:
        assert "known for" not in layerskip_log.text
    else:
        assert logged in layerskip_log.text
        assert "tests of facebookresearch/LayerSkip" in layerskip_log.text


def test_a_block_goes_before_what_is_known(engine_config, published):
    path = published / "config.json"
    config = json.loads(path.read_text())
    block = {
        "exit_layer": 2,
        "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[1, 8, 3], [9, 32, 0]],
    }
    path.write_text(json.dumps(config | {"layerskip": block}))
    spec = engine_config(
        {"method": "layerskip"}, model=str(published), tokenizer=str(published)
    ).speculative_config
    assert (spec.exit_layer, spec.num_speculative_tokens) == (2, 3)
    assert spec.num_speculative_tokens_per_batch_size == [(1, 8, 3), (9, 32, 0)]
    assert spec.uses_dynamic_speculative_decoding()
