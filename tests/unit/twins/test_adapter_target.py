# SPDX-License-Identifier: Apache-2.0
"""Catch a family whose modules an adapter's check would not find, and code that a config names."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES
from vllm_layerskip.twins.adapter_target import FINAL_NORM, layer_of, target_of

ELSEWHERE = {
    # Other names of Llama, and models whose code is in their repository.
    "LLaMAForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM", "MiMoForCausalLM",
    "TeleChat3ForCausalLM",
}  # fmt: skip
MODEL_TYPES = {
    name: model_type
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    for name in ([names] if isinstance(names, str) else names)
}


@pytest.mark.parametrize("architecture", sorted(set(SUPPORTED_ARCHITECTURES) - ELSEWHERE))
def test_every_family_has_its_layers_and_norm_where_an_adapter_has_them(architecture):
    config = CONFIG_MAPPING[MODEL_TYPES[architecture]](num_key_value_heads=8, num_hidden_layers=2)
    target = target_of(config, "model", config.num_hidden_layers)
    assert {layer_of(name) for name in target.linears} == set(range(config.num_hidden_layers))
    assert {"self_attn.o_proj", "mlp.down_proj"} <= set(target.module_names)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.get_submodule(FINAL_NORM).weight.shape == (target.hidden_size,)
    for name, shape in target.linears.items():
        assert model.get_submodule(name).weight.shape == shape


def test_the_layer_of_a_module():
    assert layer_of("model.layers.12.mlp.up_proj") == 12
    for name in ("lm_head", "model.norm", "model.layers.1", "layers.1.mlp", "model.layers.x.mlp"):
        assert layer_of(name) is None


def test_a_repositorys_code_is_not_run_and_nobody_is_asked(monkeypatch):
    """transformers would ask on a terminal, and the engine's start would wait."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))

    class Unknown(LlamaConfig):
        model_type = "unknown-to-transformers"

    config = Unknown(auto_map={"AutoModelForCausalLM": "acme/code--modeling.Model"})
    with pytest.raises(ValueError, match=r"builds no model from the config of 'acme/tiny'"):
        target_of(config, "acme/tiny", 4)
