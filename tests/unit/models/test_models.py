# SPDX-License-Identifier: Apache-2.0
"""Which models are run and which are refused, on configs alone.

Catches a model that is accepted and run by a class that does not fit it, a refusal that comes
late or does not say why, and documentation that has fallen behind.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from benchmarks.pages.architectures import TABLES, table
from benchmarks.pages.tables import with_tables
from vllm_layerskip import architectures as models
from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES, register_architecture
from vllm_layerskip.config.select_model import select_model
from vllm_layerskip.host import check

REQUEST = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
DOCS = Path(__file__).parents[3] / "docs"

TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def classes_are_inspected_in_this_process(monkeypatch):
    """vLLM starts a process for each class that it has not seen; it need not on a CPU."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


@pytest.fixture
def config_of(engine_config, tmp_path):
    """``make(config_class, architecture, **options)``: an engine config with LayerSkip."""

    def make(config_class, architecture, request=REQUEST, settings=None, **options):
        folder = str(tmp_path / "model")
        config = getattr(transformers, config_class)(**options)
        config.architectures = [architecture]
        config.save_pretrained(folder)
        return engine_config(dict(request), model=folder, tokenizer=folder, **(settings or {}))

    return make


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_a_supported_model_gets_the_class_that_derives_from_vllms(architecture):
    model = SUPPORTED_ARCHITECTURES[architecture]
    module, _, name = model.path.partition(":")
    ours = getattr(importlib.import_module(module), name)
    assert model.architecture == name
    assert check.registered_class(architecture) == model.vllm.causal_lm
    assert check.resolve(model.vllm.causal_lm) in ours.__mro__
    backbone, layer = check.resolve(model.vllm.backbone), check.resolve(model.vllm.layer)
    assert callable(backbone.embed_input_ids)
    assert callable(layer.forward)


def test_no_name_of_a_supported_class_is_forgotten():
    """Other names that vLLM gives to a class that ours derives from come for free."""
    from vllm.model_executor.models.registry import ModelRegistry

    classes = {model.vllm.causal_lm for model in SUPPORTED_ARCHITECTURES.values()}
    names = {
        name
        for name in ModelRegistry.get_supported_archs()
        # A class without its head is a pooling model.
        if name.endswith("ForCausalLM") and check.registered_class(name) in classes
    }
    assert names == set(SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize(
    ("config_class", "architecture", "ours"),
    [
        ("LlamaConfig", "LLaMAForCausalLM", "LayerSkipLlamaForCausalLM"),
        ("LlamaConfig", "InternLM3ForCausalLM", "LayerSkipLlamaForCausalLM"),
        ("MistralConfig", "MistralForCausalLM", "LayerSkipMistralForCausalLM"),
        ("Ministral3Config", "Ministral3ForCausalLM", "LayerSkipMistralForCausalLM"),
        ("Qwen3Config", "Qwen3ForCausalLM", "LayerSkipQwen3ForCausalLM"),
        ("Gemma3TextConfig", "Gemma3ForCausalLM", "LayerSkipGemma3ForCausalLM"),
    ],
)
def test_an_engine_takes_our_class(config_of, config_class, architecture, ours):
    model_config = config_of(config_class, architecture, **TINY).model_config
    assert model_config.architecture == ours


@pytest.mark.parametrize(
    "options",
    [
        {"layer_types": ["full_attention"] * 4},
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16},
    ],
)
def test_full_and_sliding_attention_are_run(config_of, options):
    config = config_of("LlamaConfig", "LlamaForCausalLM", **TINY | options)
    assert config.speculative_config.exit_layer == 2


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# config class, architecture, options, engine settings, and what the error must say.
REFUSED = {
    "another-text-model": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_layer": 4, "n_embd": 64, "n_head": 2, "vocab_size": 128},
        {},
        ("GPT2LMHeadModel", "no early-exit class"),
    ),
    "multimodal-with-a-llama": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": TINY | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
        },
        {},
        ("LlavaForConditionalGeneration", "multimodal"),
    ),
    "moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        TINY | MOE,
        {},
        ("Qwen3MoeForCausalLM", "mixture of experts (4 experts)"),
    ),
    "moe-with-mistrals-name": (
        "MixtralConfig",
        "MixtralForCausalLM",
        TINY | {"num_local_experts": 4},
        {},
        ("MixtralForCausalLM", "mixture of experts (4 experts)"),
    ),
    "mamba": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "vocab_size": 128,
            "head_dim": 32,
            "num_heads": 4,
            "n_groups": 1,
        },
        {},
        ("Mamba2ForCausalLM", "no attention layers"),
    ),
    "hybrid": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        TINY,
        {},
        ("FalconH1ForCausalLM", "hybrid", "Mamba or linear attention"),
    ),
    "encoder-decoder": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "d_model": 64,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "vocab_size": 128,
            "max_target_positions": 64,
        },
        {},
        ("WhisperForConditionalGeneration", "encoder-decoder"),
    ),
    "transformers-backend": (
        "Olmo2Config",
        "Olmo2ForCausalLM",
        TINY,
        {},
        ("Olmo2ForCausalLM", "Transformers backend"),
    ),
    "llama-through-transformers": (
        "LlamaConfig",
        "LlamaForCausalLM",
        TINY,
        {"model_impl": "transformers"},
        ("TransformersForCausalLM", "Transformers backend"),
    ),
    "chunked-attention": (
        "LlamaConfig",
        "LlamaForCausalLM",
        TINY | {"layer_types": ["chunked_attention", "full_attention"] * 2},
        {},
        ("layer_types=['chunked_attention', 'full_attention']", "sliding_attention"),
    ),
    "dual-chunk-attention": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        TINY | {"dual_chunk_attention_config": {"chunk_size": 32}},
        {},
        ("dual_chunk_attention_config",),
    ),
    "bidirectional": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        TINY | {"use_bidirectional_attention": True},
        {},
        ("bidirectional",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_layerskip_cannot_run_is_refused(config_of, name):
    if name.startswith("multimodal"):
        pytest.importorskip("torchvision", reason="vLLM's image models import it")
    config_class, architecture, options, settings, says = REFUSED[name]
    with pytest.raises(ValueError, match="LayerSkip does not support the model") as error:
        config_of(config_class, architecture, REQUEST | {"exit_layer": 1}, settings, **options)
    for words in (*says, "Supported: ", "LlamaForCausalLM", "docs/models.md", "Use another"):
        assert words in str(error.value)


def test_a_multimodal_model_is_refused_without_its_image_library(engine_config):
    model_config = copy.copy(engine_config().model_config)
    model_config.multimodal_config = object()  # This tells vLLM that it is one.
    with pytest.raises(ValueError, match="it is a multimodal model, and LayerSkip runs text"):
        select_model(model_config)


def test_a_pooling_model_is_refused(config_of):
    with pytest.raises(ValueError, match="runner='pooling'") as error:
        config_of("LlamaConfig", "LlamaForCausalLM", settings={"runner": "pooling"}, **TINY)
    assert "set runner='generate'" in str(error.value)


@pytest.fixture
def registry(monkeypatch):
    """vLLM's registry and ours; what a test registers is gone after it."""
    from vllm.model_executor.models.registry import ModelRegistry

    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    supported = dict(SUPPORTED_ARCHITECTURES)
    yield ModelRegistry
    SUPPORTED_ARCHITECTURES.clear()
    SUPPORTED_ARCHITECTURES.update(supported)


def test_a_class_that_another_plugin_put_in_place_of_vllms_is_not_replaced(config_of, registry):
    registry.register_model(
        "LlamaForCausalLM", "vllm.model_executor.models.mistral:MistralForCausalLM"
    )
    with pytest.raises(RuntimeError, match="registered by another plugin") as error:
        config_of("LlamaConfig", "LlamaForCausalLM", **TINY)
    assert "mistral:MistralForCausalLM" in str(error.value)
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    registry.register_model("LlamaForCausalLM", Qwen2ForCausalLM)
    with pytest.raises(RuntimeError, match="qwen2:Qwen2ForCausalLM"):
        config_of("LlamaConfig", "LlamaForCausalLM", **TINY)


def test_a_family_that_changed_is_refused_and_no_other(config_of, monkeypatch):
    from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", lambda self, positions, stream: stream)
    with pytest.raises(RuntimeError, match=r"does not fit Qwen2ForCausalLM .*Qwen2DecoderLayer"):
        config_of("Qwen2Config", "Qwen2ForCausalLM", **TINY)
    check.require_supported_vllm()
    assert config_of("LlamaConfig", "LlamaForCausalLM", **TINY).speculative_config.exit_layer == 2


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_packages_model_in_either_order_of_plugins(config_of, registry, order):
    from vllm_layerskip.plugin import register

    path = "vllm_layerskip.models.qwen:LayerSkipQwen2ForCausalLM"  # In the place of their class.
    registry.register_model("TheirForCausalLM", "vllm.model_executor.models.qwen2:Qwen2ForCausalLM")
    if order == "before":
        register_architecture("TheirForCausalLM", path)
        register()
    else:
        register()
        register_architecture("TheirForCausalLM", path)
    model_config = config_of("Qwen2Config", "TheirForCausalLM", **TINY).model_config
    assert model_config.architecture == "LayerSkipTheirForCausalLM"
    assert check.registered_class("LayerSkipTheirForCausalLM") == path
    assert "Their" not in table()


@pytest.mark.parametrize("path", ["my_models", "my_models:", ":Class", "my_models.Class", "a:b:c"])
def test_a_path_that_names_no_class_is_refused(registry, path):
    with pytest.raises(ValueError, match="'module:class'") as error:
        register_architecture("TheirForCausalLM", path)
    assert repr(path) in str(error.value)
    assert "TheirForCausalLM" not in SUPPORTED_ARCHITECTURES


def test_the_documented_table_is_up_to_date():
    text = (DOCS / "models.md").read_text()
    assert with_tables(text, TABLES) == text, "run: python -m benchmarks.pages.architectures"
    for name in SUPPORTED_ARCHITECTURES:
        assert f"`{name}`" in table()


def test_importing_the_list_imports_no_vllm():
    code = "import sys, vllm_layerskip.models; print('vllm' in sys.modules, 'torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["False", "False"]
    assert models.__doc__
