# SPDX-License-Identifier: Apache-2.0
"""A broken checkpoint ends the start with an error that says what is wrong.

Damaged weight files, and blocks of a wrong type: ``unit/config/test_weight_files`` and
``unit/config/test_options``. A worker that dies: ``engine/serving/test_deployment``.
"""

from __future__ import annotations

import pytest
from checkpoints import with_config
from safetensors.torch import load_file, save_file

SPEC = {"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 5}


@pytest.fixture
def broken(checkpoint, tmp_path):
    return with_config(checkpoint, tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["model.layers.7.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"]
)
def test_a_missing_weight_is_named(pool, checkpoint, broken, name):
    """vLLM alone would start and answer from memory that nobody wrote."""
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[name]
    (broken / "model.safetensors").unlink()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint lacks 1 weight\(s\): ") as error:
        pool.get(broken, speculative_config=SPEC)
    assert name in str(error.value)


def test_a_config_that_is_no_json_is_named(pool, broken):
    (broken / "config.json").write_text('{"architectures": ["Llama')
    with pytest.raises(OSError, match=r"config\.json' is not a valid JSON file"):
        pool.get(broken, speculative_config=SPEC)


def test_a_block_of_the_wrong_type_is_named(pool, checkpoint, tmp_path):
    model = with_config(checkpoint, tmp_path / "model", layerskip=[3, 5])
    with pytest.raises(ValueError, match=r"config\.json: 'layerskip' must be an object"):
        pool.get(model, speculative_config={"method": "layerskip"})


def test_a_truncated_weight_file_is_named(pool, checkpoint, broken):
    content = (checkpoint / "model.safetensors").read_bytes()
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model/model\.safetensors cannot be read"):
        pool.get(broken, speculative_config=SPEC)


def test_no_weights_at_all(pool, broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="Cannot find any model weights") as error:
        pool.get(broken, speculative_config=SPEC)
    assert str(broken) in str(error.value)


def test_a_missing_tokenizer_is_said(pool, broken):
    for file in (*broken.glob("tokenizer*"), *broken.glob("special_tokens*")):
        file.unlink()
    with pytest.raises((ValueError, OSError), match="tokenizer"):
        pool.get(broken, speculative_config=SPEC, skip_tokenizer_init=False)


def test_an_engine_starts_after_all_that(pool, checkpoint, prompts):
    engine = pool.get(checkpoint, speculative_config=SPEC)
    with engine.counting() as counts:
        assert engine.greedy(prompts[:2], 16) == pool.get(checkpoint).greedy(prompts[:2], 16)
    counts.assert_speculated()
