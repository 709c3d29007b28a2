# SPDX-License-Identifier: Apache-2.0
"""Catch an early exit that is served unasked, together with speculation or at a wrong layer, and
one whose config does not say E layers everywhere."""

import argparse
import json
import types

import pytest

from vllm_layerskip import architectures, plugin
from vllm_layerskip.config import early_exit
from vllm_layerskip.config.early_exit import find_request, per_layer_values
from vllm_layerskip.host import check

from ..conftest import NUM_LAYERS

LAYERSKIP = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


def test_the_config_says_e_layers_everywhere(engine_config):
    config = engine_config(hf_overrides={"early_exit_layer": 2, "rope_theta": 5e5})
    model = config.model_config
    assert model.architecture == "EarlyExitLlamaForCausalLM"
    assert model.hf_config.num_hidden_layers == model.hf_text_config.num_hidden_layers == 2
    assert model.get_total_num_hidden_layers() == 2
    assert model.get_num_layers(config.parallel_config) == 2
    assert model.hf_config.num_checkpoint_layers == NUM_LAYERS
    assert model.hf_config.rope_theta == 5e5, "the user's other overrides are lost"
    assert config.speculative_config is None


def test_a_plain_engine_and_each_exit_layer_are_compiled_apart(engine_config):
    hashes = {
        engine_config(hf_overrides=overrides).compute_hash()
        for overrides in ({}, *({"early_exit_layer": e} for e in (1, 2, 3)))
    }
    assert len(hashes) == 4


def test_create_model_config_is_wrapped_exactly_once(engine_args):
    wrapper = check.resolve("vllm.engine.arg_utils:EngineArgs.create_model_config")
    plugin.register()
    assert check.resolve("vllm.engine.arg_utils:EngineArgs.create_model_config") is wrapper
    assert not hasattr(wrapper.__wrapped__, "__wrapped__")


@pytest.mark.parametrize(
    "hf_overrides",
    [
        None,
        {},
        {"early_exit_layer": None},
        {"exit_layer": 2},  # One of vLLM's models may have such a key.
        {"layerskip": {"exit_layer": 2, "num_speculative_tokens": 3}},
        {"architectures": ["LayerSkipLlamaForCausalLM"], "exit_layer": 2},
        {"architectures": []},
        lambda config: config,
    ],
)
def test_nothing_else_is_a_request(hf_overrides):
    assert find_request(hf_overrides) is None


def test_a_layerskip_block_alone_serves_the_whole_model(engine_config):
    config = engine_config(hf_overrides={"layerskip": {"exit_layer": 2}})
    assert config.model_config.architecture == "LlamaForCausalLM"
    assert config.model_config.get_total_num_hidden_layers() == NUM_LAYERS


@pytest.mark.parametrize("exit_layer", [0, -1, NUM_LAYERS, NUM_LAYERS + 1, 2.0, "2", True, "auto"])
def test_a_wrong_layer_is_refused_with_the_valid_ones(engine_args, exit_layer):
    overrides = {"early_exit_layer": exit_layer}
    args = engine_args(hf_overrides=overrides)
    message = rf"early_exit_layer={exit_layer!r}.* must be an integer from 1 to {NUM_LAYERS - 1} "
    with pytest.raises(ValueError, match=message):
        args.create_model_config()
    assert args.hf_overrides == overrides, "the user's arguments were changed"


@pytest.mark.parametrize("spec", [LAYERSKIP, NGRAM, {"model": "[self]"}, {"exit_layer": 2}])
def test_speculation_is_refused_and_both_are_named(engine_config, spec):
    with pytest.raises(ValueError, match=r"early_exit_layer=2 \(--early-exit-layer\).*speculati"):
        engine_config(spec, hf_overrides={"early_exit_layer": 2})


def test_the_short_flags_of_speculation_are_refused_too(engine_args):
    args = engine_args(spec_model="[self]", spec_tokens=3, hf_overrides={"early_exit_layer": 2})
    with pytest.raises(ValueError, match=r"early_exit_layer=2.*'model': '\[self\]'"):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"runner": "pooling"}, {"early_exit_layer": 2}, "runner='pooling'"),
        (
            {},
            {"architectures": ["GPT2LMHeadModel"], "early_exit_layer": 2},
            "does not support the architecture 'GPT2LMHeadModel'.*Supported: .*LlamaForCausalLM",
        ),
        (
            {},
            {"architectures": ["LayerSkipLlamaForCausalLM"], "early_exit_layer": 2},
            "does not support the architecture 'LayerSkipLlamaForCausalLM'",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(engine_args, settings, overrides, message):
    with pytest.raises(ValueError, match=message):
        engine_args(hf_overrides=overrides, **settings).create_model_config()


def test_transformers_own_backend_is_refused():
    model_config = types.SimpleNamespace(
        architecture="TransformersForCausalLM", runner_type="generate", model_impl="transformers"
    )
    with pytest.raises(ValueError, match="model_impl='transformers' must be 'auto' or 'vllm'"):
        early_exit.cut_overrides(find_request({"early_exit_layer": 2}), model_config)


def test_values_by_layer_end_with_the_layers():
    hf_config = {
        "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 5,
        "no_rope_layers": (1, 1, 1, 0, 1, 1, 1, 0),
        "eos_token_id": [1, 2, 3, 4, 5, 6, 7, 8],  # Eight, but not by layer.
        "full_attention_layers": [0, 1, 2],
        "max_window_layers": 8,
        "num_hidden_layers": 8,
    }
    assert per_layer_values(hf_config, num_layers=8, exit_layer=4) == {
        "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
        "no_rope_layers": (1, 1, 1, 0),
        "max_window_layers": 4,
    }
    assert per_layer_values({"max_window_layers": 2}, 8, 4) == {"max_window_layers": 2}


def _parse(model, *argv):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_layerskip.plugin import register

    register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *argv]))


def test_the_flag_is_the_override(checkpoint):
    args = _parse(checkpoint, "--early-exit-layer", "2")
    assert args.hf_overrides == {"early_exit_layer": 2}
    overrides = {"rope_theta": 5e5}
    args = _parse(checkpoint, "--early-exit-layer=2", "--hf-overrides", json.dumps(overrides))
    assert args.hf_overrides == {**overrides, "early_exit_layer": 2}
    assert "early_exit_layer" not in _parse(checkpoint).hf_overrides


def test_the_flag_twice_or_with_no_number_is_refused(checkpoint):
    with pytest.raises(ValueError, match="mutually exclusive"):
        _parse(checkpoint, "--early-exit-layer", "2", "--hf-overrides", '{"early_exit_layer": 2}')
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        _parse(checkpoint, "--early-exit-layer", "two")


def test_the_class_is_vllms_own_and_loads_the_first_layers_only():
    import torch
    from vllm.model_executor.models.llama import LlamaForCausalLM

    from vllm_layerskip.models import early_exit as classes

    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.k_scale",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.10.input_layernorm.weight",
        "layers.11.attention.wq.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert [classes.layer_of(name) for name in names] == [-1, 0, 1, 2, 10, 11, -1, -1]
    (architecture,) = (
        ours
        for theirs, ours in architectures.early_exit_architectures().items()
        if theirs == "LlamaForCausalLM"
    )
    cls = getattr(classes, architecture)
    assert cls is getattr(classes, architecture)
    assert cls.__name__ == architecture
    assert issubclass(cls, LlamaForCausalLM)
    seen = []

    class Base(torch.nn.Module):
        def load_weights(self, weights):
            seen.extend(name for name, _ in weights)
            return set(seen)

    class Cut(classes.EarlyExit, Base):
        num_layers = 2

        def __init__(self):
            torch.nn.Module.__init__(self)

    Cut().load_weights((name, torch.empty(0)) for name in names)
    assert seen == [*names[:3], *names[6:]]
    with pytest.raises(AttributeError, match="EarlyExitNoSuchModel"):
        classes.EarlyExitNoSuchModel  # noqa: B018
