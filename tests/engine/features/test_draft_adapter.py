# SPDX-License-Identifier: Apache-2.0
"""A draft adapter changes what is drafted and never what comes out.

Catches an adapter that reaches the target, a merge that differs from peft's, shards of a fused
layer that are mixed up, and an adapter of another model that is noticed only in its drafts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import random_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm import EngineArgs

EXIT_LAYER, NUM_DRAFTS = 3, 4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def save_adapter(folder: Path, checkpoint: Path, targets: list[str], norm: bool) -> Path:
    """A random adapter for layers 0..E-1."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        layers_to_transform=list(range(EXIT_LAYER)),
        layers_pattern="layers",
        modules_to_save=["model.norm"] if norm else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(checkpoint), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
            elif "modules_to_save" in name:
                parameter.mul_(1.1)
    model.save_pretrained(folder)
    return folder


def add_translator(folder: Path, target: Path, matrix: torch.Tensor) -> Path:
    """A copy of an adapter with a linear map behind the final norm."""
    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    name = "base_model.model.model.norm.translator.weight"
    save_file(load_file(file) | {name: matrix}, file)
    return target


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, checkpoint) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "a", checkpoint, LINEARS, norm=True)


@pytest.fixture(scope="module")
def plain(pool, checkpoint, prompts):
    return pool.get(checkpoint).greedy(prompts, 40)


def start(pool, checkpoint, adapter, **spec):
    return pool.layerskip(
        checkpoint, EXIT_LAYER, NUM_DRAFTS, spec={"draft_adapter": str(adapter), **spec}
    )


@pytest.mark.parametrize(
    "spec",
    [{}, {"draft_quantization": "int4"}, {"draft_quantization": "int8", "draft_vocab": "yes"}],
    ids=["adapter", "int4", "int8-draft-vocab"],
)
def test_tokens_are_plain_vllms(pool, checkpoint, adapter, prompts, plain, spec, tmp_path):
    if "draft_vocab" in spec:
        file = tmp_path / "ids.json"
        file.write_text(json.dumps(sorted({token for answer in plain for token in answer})))
        spec = {**spec, "draft_vocab": str(file)}
    engine = start(pool, checkpoint, adapter, **spec)
    with engine.counting() as counts:
        assert engine.greedy(prompts, 40) == plain
    counts.assert_speculated()
    assert counts.num_verify_steps_reused == 0


def test_the_twin_is_what_peft_merges_and_the_target_stays_what_it_was(pool, checkpoint, adapter):
    engine = start(pool, checkpoint, adapter)
    twin, model = engine.runner.model.draft_twin, engine.runner.model
    original = load(checkpoint)
    merged = PeftModel.from_pretrained(load(checkpoint), adapter).merge_and_unload()
    x = torch.randn(3, original.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for index in range(EXIT_LAYER):
        for ours, theirs in (
            (twin.layers[index], merged.model.layers[index]),
            (model.model.layers[index], original.model.layers[index]),
        ):
            attention, mlp = theirs.self_attn, theirs.mlp
            qkv = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
            expected = torch.cat(qkv, 1)
            assert torch.allclose(ours.self_attn.qkv_proj(x)[0], expected, atol=1e-5)
            expected = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], 1)
            assert torch.allclose(ours.mlp.gate_up_proj(x)[0], expected, atol=1e-5)
            wide = torch.randn(3, original.config.intermediate_size)
            assert torch.allclose(ours.mlp.down_proj(wide)[0], mlp.down_proj(wide), atol=1e-5)
        assert not torch.allclose(
            twin.layers[index].mlp.down_proj(wide)[0],
            model.model.layers[index].mlp.down_proj(wide)[0],
            atol=1e-3,
        )
    assert torch.equal(twin.exit_model.model.norm.weight, merged.model.norm.weight)
    assert torch.equal(model.model.norm.weight, original.model.norm.weight)


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_a_translator_changes_drafts_and_no_token(
    pool, checkpoint, adapter, prompts, plain, tmp_path, quantization
):
    size = load(checkpoint).config.hidden_size
    accepted = {}
    for name, matrix in (
        ("none", None),
        ("identity", torch.eye(size)),
        ("reversed", torch.eye(size).flip(0)),
    ):
        folder = adapter
        if matrix is not None:
            folder = add_translator(adapter, tmp_path / name, matrix)
        engine = start(pool, checkpoint, folder, draft_quantization=quantization)
        with engine.counting() as counts:
            assert engine.greedy(prompts, 40) == plain
        accepted[name] = (counts.num_draft_tokens, counts.num_accepted_tokens)
        norm = engine.runner.model.draft_twin.exit_model.model.norm
        assert hasattr(norm, "translator") == (matrix is not None)
        assert not hasattr(engine.runner.model.model.norm, "translator")
    assert accepted["identity"] == accepted["none"]
    assert accepted["identity"][1] > 0
    assert accepted["reversed"][1] < accepted["identity"][1] / 2  # It says other tokens.


def test_layers_that_an_adapter_leaves_alone_are_shared(pool, checkpoint, tmp_path, prompts, plain):
    adapter = save_adapter(tmp_path / "a", checkpoint, ["v_proj", "up_proj"], norm=False)
    engine = start(pool, checkpoint, adapter)
    model = engine.runner.model
    twin = model.draft_twin
    assert len(twin.linears) == 2 * EXIT_LAYER
    for mine, target in zip(twin.layers, model.model.layers, strict=False):
        assert mine.self_attn.o_proj is target.self_attn.o_proj
        assert mine.mlp.down_proj is target.mlp.down_proj
        assert mine.input_layernorm is target.input_layernorm
        assert mine.self_attn.attn is target.self_attn.attn
        assert mine.mlp.gate_up_proj is not target.mlp.gate_up_proj
    assert twin.exit_model is model
    with engine.counting() as counts:
        assert engine.greedy(prompts, 40) == plain
    counts.assert_speculated()


def test_an_adapter_that_does_nothing_drafts_what_the_layers_draft(
    pool, checkpoint, prompts, adapter
):
    """And a random one drafts otherwise: the adapter is what makes the difference."""
    accepted = {}
    folder = adapter.parent / "zero"
    if not folder.exists():
        model = get_peft_model(
            load(checkpoint),
            LoraConfig(
                target_modules=["up_proj"], layers_to_transform=[0], layers_pattern="layers"
            ),
        )
        model.save_pretrained(folder)
    for name, engine in {
        "none": pool.layerskip(
            checkpoint, EXIT_LAYER, NUM_DRAFTS, spec={"reuse_exit_states": False}
        ),
        "zero": start(pool, checkpoint, folder),
        "random": start(pool, checkpoint, adapter),
    }.items():
        engine.reset_prefix_cache()
        with engine.counting() as counts:
            engine.greedy(prompts, 40)
        accepted[name] = counts.drafts
    assert accepted["zero"] == accepted["none"]
    assert accepted["random"] != accepted["none"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"exit_layer": 2}, "model.layers.2"),
        ({"draft_adapter": "/nowhere"}, "draft_adapter='/nowhere'"),
    ],
)
def test_a_wrong_adapter_is_refused_before_weights_are_loaded(checkpoint, adapter, spec, says):
    spec = {
        "method": "layerskip",
        "exit_layer": EXIT_LAYER,
        "num_speculative_tokens": 2,
        "draft_adapter": str(adapter),
        **spec,
    }
    args = EngineArgs(str(checkpoint), speculative_config=spec)
    with pytest.raises(ValueError, match="speculative_config: draft_adapter=") as error:
        args.create_engine_config()
    assert says in str(error.value)


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path, adapter, checkpoint):
    other = random_llama(tmp_path / "other")
    spec = {
        "method": "layerskip",
        "exit_layer": EXIT_LAYER,
        "num_speculative_tokens": 2,
        "draft_adapter": str(adapter),
    }
    args = EngineArgs(str(other), skip_tokenizer_init=True, speculative_config=spec)
    with pytest.raises(ValueError, match="draft_adapter=") as error:
        args.create_engine_config()
    assert str(checkpoint) in str(error.value)
    assert str(other) in str(error.value)


def test_a_part_that_the_model_names_otherwise_is_not_dropped_in_silence(
    pool, checkpoint, adapter, monkeypatch
):
    twin = start(pool, checkpoint, adapter).runner.model.draft_twin
    monkeypatch.setattr(twin, "_merged", twin._merged - {"model.layers.1.mlp.up_proj"})
    with pytest.raises(ValueError, match=r"changes model\.layers\.1\.mlp\.up_proj, and LayerSkip"):
        twin._require_all_merged()
