# SPDX-License-Identifier: Apache-2.0
"""Catch twins whose weights are not those of an engine's twin, and scores of another model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unit.evaluation.tiny_models import FAMILIES, SHAPE, random_llama
from unit.twins import adapters
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.exits import exit_logits
from vllm_layerskip.evaluation.scores import Target, score_exits
from vllm_layerskip.evaluation.settings import Checkpoint, TwinSettings
from vllm_layerskip.evaluation.twin import check_twin, make_twin
from vllm_layerskip.twins.adapter import AdapterWeights
from vllm_layerskip.twins.kinds import KINDS
from vllm_layerskip.twins.rounding import round_trip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapter(tmp_path):
    """For layers 0 and 1 of ``adapters.BASE``, and its final norm."""
    norm = {"base_model.model.model.norm.weight": torch.linspace(0.5, 2, 32)}
    return adapters.read(adapters.write(tmp_path / "heal", tensors=adapters.weights() | norm))


def base_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(adapters.BASE).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_every_linear_layer_is_rounded_and_nothing_else(family, kind):
    """In the reference every weight is named; 48 inputs cannot be cut into groups."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    original = copy.deepcopy(model)
    whole = make_twin(model, kind, None)
    linears = [f"self_attn.{part}_proj" for part in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]
    rounded = {f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in linears}
    downs = {f"model.layers.{layer}.mlp.down_proj" for layer in range(3)}
    assert set(whole) == (downs if kind == "int4" else set())
    if kind != "int4":
        rounded |= {f"{name}.weight" for name in downs}
    rounded.add("lm_head.weight")
    for name, value in model.state_dict().items():
        before = original.state_dict()[name]
        assert value.dtype == before.dtype
        if name in rounded:
            assert torch.equal(value, round_trip(before, kind)), name
            assert not torch.equal(value, before)
        else:  # Embeddings, tied or not, norms and biases.
            assert torch.equal(value, before), name


def test_an_adapter_is_merged_before_it_is_rounded(adapter):
    model, original = base_model(), base_model()
    whole = make_twin(model, "int8", adapter)
    found = AdapterWeights(adapter)
    assert whole == []
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear):
            delta = found.delta(name)
            weight = module.weight if delta is None else module.weight + delta
            assert torch.equal(model.get_submodule(name).weight, round_trip(weight, "int8")), name
    assert torch.equal(model.model.norm.weight, torch.linspace(0.5, 2, 32))


def test_an_adapter_alone_leaves_other_layers_as_they_are(adapter):
    model, original = base_model(), base_model()
    make_twin(model, "none", adapter)
    same = {
        name
        for name, value in model.state_dict().items()
        if torch.equal(value, original.state_dict()[name])
    }
    changed = {f"{name}.weight" for name in adapter.scaling} | {"model.norm.weight"}
    assert set(model.state_dict()) - same == changed


def test_a_translator_stands_behind_the_final_norm(tmp_path):
    matrix = torch.randn(32, 32) / 6
    name = "base_model.model.model.norm.translator.weight"
    adapter = adapters.read(
        adapters.write(tmp_path / "one", tensors=adapters.weights() | {name: matrix})
    )
    plain, translated = base_model(), base_model()
    make_twin(plain, "none", adapters.read(adapters.write(tmp_path / "plain")))
    make_twin(translated, "none", adapter)
    states = torch.randn(1, 5, 32)
    expected = plain.lm_head(plain.model.norm(states) @ matrix.T)
    with torch.no_grad():
        torch.testing.assert_close(exit_logits(translated, states), expected)
        assert not torch.allclose(exit_logits(plain, states), expected, atol=1e-2)


def test_bfloat16_weights_stay_bfloat16(adapter):
    model, full = base_model().bfloat16(), base_model()
    make_twin(model, "int4", adapter)
    name = "model.layers.0.self_attn.q_proj"
    merged = full.get_submodule(name).weight.bfloat16().float() + AdapterWeights(adapter).delta(
        name
    )
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_submodule(name).weight, round_trip(merged, "int4").bfloat16())


def said_by(model, windows):
    """Argmaxes of every exit, ``[L, B, T]``, as models cut after each layer."""
    layers, found = model.model.layers, []
    for num_layers in range(1, len(layers) + 1):
        model.model.layers = layers[:num_layers]
        with torch.no_grad():
            found.append(model(windows, use_cache=False).logits.argmax(-1))
    model.model.layers = layers
    return torch.stack(found)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_twins_agreement_is_with_the_model_as_it_was(batch_size):
    model = random_llama(initializer_range=0.3)
    twin = copy.deepcopy(model)
    make_twin(twin, "int4", None)
    windows = torch.randint(0, 48, (5, 30))
    target = Target()
    own = score_exits(model, windows, batch_size, target=target)
    scores = score_exits(twin, windows, batch_size, target=target)
    truth, said = said_by(model, windows)[-1], said_by(twin, windows)
    expected = (said == truth)[:, :, :-1].float().mean((1, 2))
    assert [s.agreement for s in scores] == pytest.approx(expected.tolist(), abs=1e-6)
    assert 0.3 < scores[-1].agreement < 1
    assert own[-1].agreement == 1
    # Not with the twin's own last layer.
    assert score_exits(twin, windows, batch_size)[-1].agreement == 1


def test_more_bits_agree_more_and_spoiled_weights_hardly(adapter):
    windows = torch.randint(0, 64, (6, 40))
    agreement = {}
    for kind in ("int4", "int8", "none"):
        model, target = base_model(), Target()
        score_exits(model, windows, target=target)
        make_twin(model, kind, adapter if kind == "none" else None)
        agreement[kind] = score_exits(model, windows, target=target)[-1].agreement
    assert agreement["int8"] > agreement["int4"] > 0.8
    assert agreement["none"] < 0.5  # A random adapter.


def checkpoint(name: str = "acme/tiny") -> Checkpoint:
    return Checkpoint("--model", name, "tiny")


def test_the_adapter_is_checked_against_every_layer(tmp_path):
    """Eval shows every exit, so none bounds the layers."""
    folder = adapters.write(tmp_path / "heal", tensors=adapters.weights(num_layers=4))
    settings = TwinSettings("int4", str(folder))
    found = check_twin(settings, checkpoint(), adapters.BASE)
    assert found.num_layers == 4
    with pytest.raises(UserError, match=rf"^--draft-adapter {folder}: it was made for 'acme/tiny'"):
        check_twin(settings, checkpoint("acme/other"), FAMILIES["qwen3"])


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    base = tmp_path / "base"
    base_model().save_pretrained(base)
    record = {"base_model": "acme/tiny", "base_digest": "0" * 16}
    folder = adapters.write(tmp_path / "heal", record=record)
    settings = TwinSettings(draft_adapter=str(folder))
    with pytest.raises(UserError, match=r"'acme/tiny' with the weights 0{16}"):
        check_twin(settings, checkpoint(str(base)), adapters.BASE)


def test_a_model_that_cannot_have_the_twin():
    quantized = copy.deepcopy(adapters.BASE)
    quantized.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match=r"--draft-quantization int8: acme/tiny is quantised"):
        check_twin(TwinSettings("int8"), checkpoint(), quantized)
    odd = type(adapters.BASE)(**SHAPE | {"hidden_size": 40, "intermediate_size": 50})
    odd.head_dim, odd.num_attention_heads = 20, 2
    with pytest.raises(UserError, match=r"multiple of 32, and those of this model have 40, 50"):
        check_twin(TwinSettings("int4"), checkpoint(), odd)
    assert check_twin(TwinSettings("int8"), checkpoint(), odd) is None
    assert check_twin(TwinSettings("int4"), checkpoint(), adapters.BASE) is None


def test_settings_name_the_twin():
    name = str(Path("runs") / "heal")
    assert TwinSettings("int4").name == "int4"
    assert TwinSettings("none", name).name == "adapter heal"
    assert TwinSettings("fp8", name).name == "fp8 + adapter heal"
    assert TwinSettings("int4").option == "--draft-quantization int4"
    assert TwinSettings(draft_adapter=name).option == f"--draft-adapter {name}"
    both = f"--draft-quantization fp8 --draft-adapter {name}"
    assert TwinSettings("fp8", name).option == both
