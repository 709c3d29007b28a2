# SPDX-License-Identifier: Apache-2.0
"""Catch adapters that do not fit their target, and a merge that differs from peft's."""

from __future__ import annotations

import json
import math
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from unit.twins.adapters import BASE, PREFIX, read, settings, weights, write
from vllm_layerskip.twins.adapter import AdapterWeights
from vllm_layerskip.twins.digest import checkpoint_digest

Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"
TRANSLATOR = "base_model.model.model.norm.translator.weight"


def refused(folder, *words: str, **arguments) -> None:
    """Reading the folder must fail, with a message that names the option and each of ``words``."""
    with pytest.raises(ValueError, match=re.escape(f"draft_adapter={str(folder)!r}: ")) as error:
        read(folder, **arguments)
    for word in words:
        assert word in str(error.value)


# Weights as peft merges them.


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"lora_alpha": 24},
        {"lora_alpha": 6, "use_rslora": True},
        {
            "r": 8,
            "rank_pattern": {"v_proj": 2, "0.mlp.down_proj": 3},
            "alpha_pattern": {"q_proj": 5},
        },
        {
            "rank_pattern": {"^model.layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {r".*\.1\..*_proj": 7, "q_proj": 2},
            "use_rslora": True,
        },
        {"init_lora_weights": "orthogonal"},
        {"modules_to_save": ["model.norm"]},
    ],
    ids=lambda lora: "-".join(lora) or "plain",
)
def test_the_merge_is_pefts(tmp_path, lora):
    """Scaled, merged and saved by peft itself, for every linear layer of two layers."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(BASE)
    original = {name: value.clone() for name, value in base.state_dict().items()}
    defaults = {"r": 4, "target_modules": "all-linear", "layers_to_transform": None}
    defaults["target_modules"] = r"model\.layers\.[01]\..*_proj"
    model = peft.get_peft_model(base, peft.LoraConfig(**defaults | lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()

    found = AdapterWeights(read(tmp_path))
    assert len(found.module_names) == 14
    for name, value in merged.items():
        module = name.removesuffix(".weight")
        if name == "model.norm.weight" and "modules_to_save" in lora:
            assert torch.equal(found.final_norm(), value)
            assert not torch.equal(value, original[name])
        elif module in found.module_names:
            torch.testing.assert_close(original[name] + found.delta(module), value)
            assert not torch.allclose(original[name], value)
        else:
            assert found.delta(module) is None
            assert torch.equal(value, original[name])
    assert (found.final_norm() is not None) == ("modules_to_save" in lora)


def test_weights_of_16_bits_are_merged_in_float32(tmp_path):
    half = {name: value.bfloat16() for name, value in weights().items()}
    delta = AdapterWeights(read(write(tmp_path, tensors=half))).delta(Q_PROJ)
    a, b = (half[f"{PREFIX}0.self_attn.q_proj.lora_{part}.weight"].float() for part in "AB")
    assert delta.dtype == torch.float32
    assert torch.equal(delta, b @ a * 2)


def test_names_with_an_adapters_name_or_without_a_prefix_are_read(tmp_path):
    plain = AdapterWeights(read(write(tmp_path / "plain"))).delta(Q_PROJ)
    tensors = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value
        for name, value in weights().items()
    }
    tensors["model.norm.modules_to_save.default.weight"] = torch.ones(32)
    other = AdapterWeights(read(write(tmp_path / "other", tensors=tensors)))
    assert torch.equal(other.delta(Q_PROJ), plain)
    assert torch.equal(other.final_norm(), torch.ones(32))


def test_a_translator_is_read_and_its_shape_is_checked(tmp_path):
    matrix = torch.randn(32, 32)
    folder = write(tmp_path / "one", tensors=weights() | {TRANSLATOR: matrix.bfloat16()})
    adapter = read(folder)
    assert (adapter.has_translator, adapter.has_final_norm) == (True, False)
    assert torch.equal(AdapterWeights(adapter).translator(), matrix.bfloat16().float())
    assert AdapterWeights(read(write(tmp_path / "none"))).translator() is None
    folder = write(tmp_path / "other", tensors=weights() | {TRANSLATOR: torch.ones(32, 16)})
    refused(folder, "exit translator has shape [32, 16]", "hidden size is 32")
    folder = write(tmp_path / "nan", tensors=weights() | {TRANSLATOR: matrix * math.nan})
    with pytest.raises(ValueError, match="translator.weight.*not finite"):
        AdapterWeights(read(folder)).check_finite()


def test_what_is_read_without_weights(tmp_path):
    folder = write(tmp_path, record={"exit_layer": 2, "base_model": "acme/base", "scores": {}})
    adapter = read(folder)
    assert adapter.path == folder
    assert adapter.num_layers == 2
    assert adapter.exit_layer == 2
    assert adapter.base_model == "acme/base"
    assert not adapter.has_final_norm
    assert len(adapter.scaling) == 6
    assert set(adapter.scaling.values()) == {2.0}
    assert pickle.loads(pickle.dumps(adapter)) == adapter
    with pytest.raises(AttributeError):
        adapter.digest = "other"
    assert read(write(tmp_path / "none")).base_model == "acme/tiny"


def test_the_digest_is_of_the_content(tmp_path):
    one, two = read(write(tmp_path / "a")), read(write(tmp_path / "b"))
    assert one.digest == two.digest
    assert re.fullmatch("[0-9a-f]{16}", one.digest)
    assert read(write(tmp_path / "c", settings(lora_alpha=9))).digest != one.digest
    tensors = weights()
    next(iter(tensors.values()))[0, 0] += 1
    assert read(write(tmp_path / "d", tensors=tensors)).digest != one.digest


@pytest.mark.parametrize("num_layers", [None, 2, 3, 4])
def test_fewer_adapted_layers_than_drafts_run_are_fine(tmp_path, num_layers):
    """One of another tool may adapt some layers only."""
    assert read(write(tmp_path), exit_layer=num_layers).num_layers == 2


# The folder and its files.


def test_a_missing_folder_or_file(tmp_path):
    refused(tmp_path / "gone", "there is no folder", "adapter_config.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "there is no folder")
    refused(tmp_path / ("x" * 5000), "there is no folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "there is no adapter_config.json in it")
    folder = write(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "there is no adapter_model.safetensors", "safetensors")


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["adapter_config.json", "layerskip_adapter.json"])
def test_an_unreadable_json_file_is_named(tmp_path, name, content):
    folder = write(tmp_path)
    (folder / name).write_bytes(content)
    refused(folder, name, "again" if name.startswith("layerskip") else "Give a folder")


@pytest.mark.parametrize("content", [b"", b"\xff" * 300, None])
def test_unreadable_weights_are_named(tmp_path, content):
    file = write(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    refused(tmp_path, "adapter_model.safetensors cannot be read", "again")


# Kinds of adapter.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ("'IA3'", "'LORA'")),
        ({"peft_type": None}, ("None", "'LORA'")),
        ({"use_dora": True}, ("use_dora=True", "DoRA")),
        ({"bias": "all"}, ("bias='all'", "without bias")),
        ({"lora_bias": True}, ("lora_bias=True",)),
        ({"fan_in_fan_out": True}, ("fan_in_fan_out=True",)),
        ({"layer_replication": [[0, 2]]}, ("layer_replication", "number of layers")),
        ({"trainable_token_indices": [1]}, ("trainable_token_indices=[1]", "embeddings")),
        ({"target_parameters": ["experts.up"]}, ("target_parameters",)),
        ({"alora_invocation_tokens": [3]}, ("alora_invocation_tokens",)),
        ({"use_qalora": True}, ("use_qalora",)),
        ({"use_bdlora": {"nblocks": 2}}, ("use_bdlora",)),
        ({"kasa_config": {"beta": 1}}, ("kasa_config",)),
        ({"monteclora_config": {}, "arrow_config": {"top_k": 1}}, ("arrow_config",)),
        ({"a_kind_of_2031": True}, ("a_kind_of_2031=True", "not known to be right")),
        ({"init_lora_weights": "pissa"}, ("'pissa'", "path_initial_model_for_weight_conversion")),
        ({"init_lora_weights": "pissa_niter_4"}, ("'pissa_niter_4'",)),
        ({"init_lora_weights": "loftq"}, ("'loftq'", "base model's weights")),
        ({"init_lora_weights": "a_way_of_2031"}, ("'a_way_of_2031'",)),
        *(({"r": r}, (f"r={r!r}", "at least 1")) for r in (0, -4, 1.5, "4", None, True)),
        *(
            ({"lora_alpha": alpha}, (f"lora_alpha={alpha!r}", "above 0"))
            for alpha in (0, -8, "8", None, math.inf, math.nan, 10**400, True)
        ),
        ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj']=0",)),
        ({"alpha_pattern": {"q_proj": -1}}, ("alpha_pattern['q_proj']=-1",)),
        ({"rank_pattern": {"(": 2}}, ("'('", "regular expression")),
        ({"rank_pattern": [2]}, ("rank_pattern=[2]", "JSON object")),
    ],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, dict) else None,
)
def test_what_a_merge_would_get_wrong_is_refused(tmp_path, changes, words):
    refused(write(tmp_path, settings(**changes)), "adapter_config.json", *words)


def test_settings_that_a_merge_does_not_need_are_let_be(tmp_path):
    harmless = {
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "eva",
        "velora_config": {"nblocks": 1},
        "revision": "main",
        "auto_mapping": {"unsloth_fixed": True},
        "exclude_modules": ["lm_head"],
        "a_kind_of_2031": None,
        "another_kind": False,
    }
    read(write(tmp_path, settings(**harmless)))
    read(write(tmp_path / "old", {"peft_type": "LORA", "r": 4, "lora_alpha": 8}))


def test_every_setting_of_pefts_own_default_is_known(tmp_path):
    """A setting that a newer peft adds and switches on by default would refuse every adapter."""
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=4).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    read(write(tmp_path, written))


# Weights by name.


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.model.layers.0.input_layernorm.weight",
        "base_model.model.model.norm.bias",
        f"{PREFIX}0.self_attn.q_proj.lora_magnitude_vector",
        f"{PREFIX}0.self_attn.q_proj.lora_B.bias",
        f"{PREFIX}0.self_attn.q_proj.bias",
        "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",  # Of a model without a head.
    ],
)
def test_other_weights_are_named(tmp_path, name):
    refused(write(tmp_path, tensors=weights() | {name: torch.ones(4, 4)}), name, "model.norm")


def test_pefts_norm_that_is_every_norm_is_refused(tmp_path):
    """modules_to_save=["norm"] is every module whose name ends with norm."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    model = AutoModelForCausalLM.from_config(BASE)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    refused(tmp_path, "input_layernorm", "['model.norm']", "every norm")


def test_half_a_pair_and_none(tmp_path):
    tensors = weights()
    del tensors[f"{PREFIX}1.mlp.down_proj.lora_B.weight"]
    refused(write(tmp_path / "half", tensors=tensors), "only lora_A of model.layers.1.mlp.down")
    refused(write(tmp_path / "norm", tensors={NORM: torch.ones(32)}), "adapts no linear layer")


def test_quantised_weights_are_refused(tmp_path):
    tensors = {name: value.to(torch.int8) for name, value in weights().items()}
    refused(write(tmp_path, tensors=tensors), "I8", "F32, F16, BF16")


@pytest.mark.parametrize("changes", [{"r": 8}, {"rank_pattern": {"down_proj": 2}}])
def test_ranks_that_disagree_are_refused(tmp_path, changes):
    refused(write(tmp_path, settings(**changes)), "rank 4", "copy both again")


# The target.


def changed(**values) -> LlamaConfig:
    return LlamaConfig(**BASE.to_dict() | values)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(hidden_size=64), ("B [32, 4]", "64 outputs", "hidden size 64")),
        (changed(intermediate_size=96), ("mlp.down_proj", "96 inputs")),
        (changed(num_key_value_heads=4), ("self_attn.v_proj", "32 outputs")),
        (changed(num_hidden_layers=1), ("model.layers.1", "the target has 1 layers")),
    ],
)
def test_an_adapter_for_another_model_is_refused_by_its_name(tmp_path, config, words):
    arguments = {"hf_config": config, "num_layers": config.num_hidden_layers}
    refused(
        write(tmp_path),
        "made for 'acme/tiny'", "target is 'acme/tiny-copy'", "trained on the target", *words,
        **arguments,
    )  # fmt: skip
    nameless = write(tmp_path / "nameless", settings(base_model_name_or_path=None))
    refused(nameless, "made for another model", **arguments)


def test_a_layer_of_another_family_is_named(tmp_path):
    tensors = weights()
    for part, shape in (("A", (4, 32)), ("B", (64, 4))):
        tensors[f"{PREFIX}0.self_attn.qkv_proj.lora_{part}.weight"] = torch.zeros(shape)
    refused(write(tmp_path, tensors=tensors), "self_attn.qkv_proj", "self_attn.q_proj, self_attn")


def test_a_norm_of_another_shape(tmp_path):
    folder = write(tmp_path, tensors=weights() | {NORM: torch.ones(8)})
    refused(folder, "final norm has shape [8]", "[32]", "made for 'acme/tiny'")


def test_families_have_their_own_shapes(tmp_path):
    """Qwen3's heads may be wider than its hidden size."""
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
    )
    tensors = {
        f"{PREFIX}0.self_attn.o_proj.lora_A.weight": torch.ones(4, 64),
        f"{PREFIX}0.self_attn.o_proj.lora_B.weight": torch.ones(32, 4),
    }
    assert read(write(tmp_path, tensors=tensors), hf_config=config).num_layers == 1
    refused(tmp_path, "o_proj", "32 inputs")


def test_the_config_is_left_as_it_is(tmp_path):
    before = BASE.to_dict()
    read(write(tmp_path))
    assert BASE.to_dict() == before


def test_a_config_that_is_no_models(tmp_path):
    from transformers import PretrainedConfig

    refused(write(tmp_path), "builds no model", hf_config=PretrainedConfig(hidden_size=32))


def test_a_layer_beyond_the_exit_is_named(tmp_path):
    folder = write(tmp_path, tensors=weights(num_layers=3))
    refused(
        folder, "'model.layers.2.mlp.down_proj'", "exit_layer=2", "0 to 1", "exit_layer to 3,"
    )  # fmt: skip
    whole = write(tmp_path / "whole", tensors=weights(num_layers=4))
    refused(whole, "exit_layer=2", "Set exit_layer to 4 together with draft_quantization")
    assert read(folder, exit_layer=3).num_layers == 3


@pytest.mark.parametrize("exit_layer", [3, 4])
def test_another_exit_than_the_adapters_own_is_refused(tmp_path, exit_layer):
    folder = write(tmp_path, record={"exit_layer": 2})
    refused(folder, "trained to exit after 2 layers", "Set exit_layer to 2", exit_layer=exit_layer)
    read(folder, exit_layer=2)
    read(folder, exit_layer=None)


@pytest.mark.parametrize(
    ("recorded", "says"), [(1, "its weights adapt 2 layers"), (99, "the target has 4 layers")]
)
def test_a_record_that_contradicts_weights_or_target(tmp_path, recorded, says):
    folder = write(tmp_path, tensors=weights(num_layers=2), record={"exit_layer": recorded})
    refused(folder, f"layerskip_adapter.json has exit_layer={recorded}, and {says}", "copy it")


def test_a_recorded_digest_that_is_no_text(tmp_path):
    refused(write(tmp_path, record={"base_digest": 5}), "base_digest=5, which must be text")


@pytest.mark.parametrize("exit_layer", [0, "2", True, 1.5])
def test_a_recorded_exit_that_is_none(tmp_path, exit_layer):
    refused(write(tmp_path, record={"exit_layer": exit_layer}), "layerskip_adapter.json has exit")


def base_checkpoint(folder, value: float):
    folder.mkdir()
    save_file({"w": torch.full((4, 4), value)}, folder / "model.safetensors")
    return folder


def test_a_sibling_of_the_base_model_is_refused(tmp_path):
    """Same shapes, other weights."""
    base = base_checkpoint(tmp_path / "base", 1.0)
    sibling = base_checkpoint(tmp_path / "sibling", 1.5)
    record = {"base_model": "acme/base", "base_digest": checkpoint_digest(base), "exit_layer": 2}
    folder = write(tmp_path / "adapter", record=record)
    read(folder, base_folder=base)
    refused(
        folder, "made for 'acme/base'", "'acme/tiny-copy'", "other values", "delete base_digest",
        base_folder=sibling,
    )  # fmt: skip
    # Unknown on either side: shapes alone decide.
    read(folder)
    read(folder, base_folder=tmp_path)
    read(write(tmp_path / "other", record={"exit_layer": 2}), base_folder=sibling)


# Values, and files that change.


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_when_they_are_read(tmp_path, value):
    name = f"{PREFIX}0.self_attn.q_proj.lora_B.weight"
    tensors = weights() | {NORM: torch.full((32,), value)}
    tensors[name][0, 0] = value
    found = AdapterWeights(read(write(tmp_path, tensors=tensors)))
    with pytest.raises(ValueError, match="not finite"):
        found.check_finite()
    with pytest.raises(ValueError, match="lora_B.weight.*not finite.*another adapter") as error:
        found.delta(Q_PROJ)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="norm.weight.*not finite"):
        found.final_norm()
    assert found.delta("model.layers.1.self_attn.q_proj") is not None


def test_finite_values_pass(tmp_path):
    AdapterWeights(read(write(tmp_path))).check_finite()


def test_files_that_have_changed_since_they_were_checked(tmp_path):
    adapter = read(write(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="changed.*every machine"):
        AdapterWeights(adapter)
    file.unlink()
    with pytest.raises(ValueError, match="draft_adapter.*No such file.*must stay"):
        AdapterWeights(adapter)
