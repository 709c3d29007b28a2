# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that cannot be read is one line with its option, whatever is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.checkpoints import load_config, load_model
from vllm_layerskip.training.config import ModelConfig
from vllm_layerskip.training.model import load_config as load_config_to_train
from vllm_layerskip.training.model import load_model as load_model_to_train

CHECKPOINT = Path(vllm_layerskip.__file__).parent / "checkpoint"


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


@pytest.mark.parametrize(
    "content", ["[]", "{", '"text"', "3", json.dumps({"model_type": "none"}), "heads"]
)
def test_a_config_that_is_none(checkpoint, content):
    if content == "heads":  # Values that do not go together.
        config = json.loads((checkpoint / "config.json").read_text())
        content = json.dumps({**config, "num_attention_heads": 7})
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"^--compare {checkpoint}: no config could be read \("):
        load_config(str(checkpoint), "--compare")
    with pytest.raises(UserError, match=r"^model\.path: .* holds no checkpoint that could be read"):
        load_config_to_train(ModelConfig(path=str(checkpoint)), None)


def test_weights_that_are_cut(checkpoint):
    (weights,) = checkpoint.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"^--model .*: the model could not be read \("):
        load_model(str(checkpoint), "--model")
    model = ModelConfig(path=str(checkpoint))
    with pytest.raises(UserError, match=r"^model\.path: the weights of .* could not be read"):
        load_model_to_train(model, load_config_to_train(model, None))
