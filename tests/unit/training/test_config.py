# SPDX-License-Identifier: Apache-2.0
"""Catch a training config whose mistakes are not told by key and remedy, or are taken silently."""

from pathlib import Path

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.recipe import Recipe

MINIMAL = """
model: {path: base}
data: {train: {files: text.txt}}
output: {folder: out/model}
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return TrainConfig.from_yaml(path)

    return load


def test_what_is_not_given_has_defaults(load):
    config = load(MINIMAL)
    assert config.recipe == Recipe()
    assert config.data.train.files == ("text.txt",)
    assert config.data.packing
    assert config.data.loss_on == "responses"
    assert config.output.folder == Path("out/model")
    assert config.output.resolved_run_folder == Path("out/model.run")
    assert config.lora is None


def test_every_section_is_read(load):
    config = load(
        MINIMAL.replace("seq_len", "")
        + """
recipe: {max_layer_dropout: 2e-1, exit_loss_scale: 1, curriculum: gradual, exit_layers: [4, 2]}
training: {learning_rate: 3e-5, fsdp_config: {version: 2}}
lora: {r: 8}
"""
    )
    assert config.recipe.max_layer_dropout == 0.2
    assert config.recipe.exit_loss_scale == 1.0
    assert config.recipe.exit_layers == (2, 4)
    assert config.training == {"learning_rate": "3e-5", "fsdp_config": {"version": 2}}
    assert config.lora == {"r": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "recipe: {p_max: 0.1}",
            "recipe.p_max is no key of this file. .*Valid keys: .*m",
        ),
        (MINIMAL + "recipe: {rotatoin: 1}", "recipe.rotatoin .*Did you mean rotation?"),
        (MINIMAL + "reciep: {}", "reciep is no key of this file. Did you mean recipe?"),
        (
            MINIMAL + "recipe: {exit_loss_scale: 1.5}",
            r"recipe.exit_loss_scale=1.5 \(e_scale\) must",
        ),
        (MINIMAL + "recipe: {exit_loss_scale: -0.1}", r"must be in \[0, 1\]"),
        (
            MINIMAL + "recipe: {max_layer_dropout: 1}",
            r"recipe.max_layer_dropout=1.0 \(p_max\) must",
        ),
        (MINIMAL + "recipe: {rotation: 0}", r"recipe.rotation=0 \(R\) must be at least 1"),
        (MINIMAL + "recipe: {rotation: 2.5}", "recipe.rotation=2.5 must be an integer"),
        (MINIMAL + "recipe: {rotation: true}", "recipe.rotation=True must be an integer"),
        (MINIMAL + "recipe: {from_scratch: 1}", "recipe.from_scratch=1 must be true or false"),
        (
            MINIMAL + "recipe: {max_layer_dropout: high}",
            "recipe.max_layer_dropout='high' must be a",
        ),
        (MINIMAL + "recipe: {curriculum: random}", "recipe.curriculum='random' must be one of"),
        (
            MINIMAL + "recipe: {exit_layers: [1, 4]}",
            r"recipe.exit_layers=\[1, 4\] must name .*e\(0\)",
        ),
        (MINIMAL + "recipe: 3", "recipe must be a mapping with keys of max_layer_dropout"),
        (MINIMAL + "training: {output_dir: x}", "training.output_dir .*Use output.run_folder"),
        (MINIMAL + "training: 3", "training must be a mapping"),
        ("model: {path: base}", "data is missing"),
        ("[1, 2]", "the file must be a mapping"),
        ("", "the file must be a mapping"),
        ("a: [", "this is no YAML"),
        (MINIMAL.replace("{path: base}", "{}"), "model: give exactly one of path"),
        (
            MINIMAL.replace("{path: base}", "{path: a, model_type: llama}"),
            "model: give exactly one of path",
        ),
        (MINIMAL.replace("{path: base}", "{model_type: llama}"), "model.tokenizer: .*needs one"),
        (
            MINIMAL.replace("{path: base}", "{path: a, config: {x: 1}}"),
            "model.config is for models",
        ),
        (MINIMAL.replace("{path: base}", "{path: 3}"), "model.path=3 must be text"),
        (
            MINIMAL.replace("path: base", "path: a, dtype: int8"),
            "model.dtype='int8' must be one of",
        ),
        (MINIMAL.replace("{files: text.txt}", "{}"), "data.train: give exactly one of files"),
        (
            MINIMAL.replace("{files: text.txt}", "{files: a, dataset: b}"),
            "not files and dataset",
        ),
        (MINIMAL.replace("text.txt}", "a, split: x}"), "name and split belong to dataset"),
        (MINIMAL.replace("text.txt}", "a}, seq_len: 1"), "data.seq_len=1 must be at least 2"),
        (
            MINIMAL.replace("out/model", "a, num_speculative_tokens: 0"),
            "output.num_speculative_tokens=0 must be at least 1",
        ),
    ],
)
def test_a_mistake_is_told_by_its_key(load, text, expected):
    with pytest.raises(UserError, match=expected):
        load(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="--config .*none.yaml: No such file"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8 text"):
        TrainConfig.from_yaml(tmp_path / "binary")


def test_a_config_needs_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = (
        "import sys, vllm_layerskip.training.config;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
