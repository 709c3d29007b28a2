# SPDX-License-Identifier: Apache-2.0
"""A draft twin of vLLM's own linear layers, without an engine.

Catches a twin that changes its target, weights that are made too late or too often, and a machine
without kernels that is found out after the start.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_layerskip.config.layerskip_config import LayerSkipConfig
from vllm_layerskip.twins.kinds import FP8, INT4, INT8, KINDS
from vllm_layerskip.twins.rounding import round_trip
from vllm_layerskip.worker import draft_twin, twin_linear
from vllm_layerskip.worker.draft_twin import SLOWER, DraftTwin
from vllm_layerskip.worker.twin_linear import TwinLinear

HIDDEN, INTERMEDIATE, VOCAB = 64, 128, 96

pytestmark = pytest.mark.usefixtures("one_rank")


class Layer(nn.Module):
    """A decoder layer's linear layers, some of them inside of other modules."""

    def __init__(self, intermediate: int = INTERMEDIATE) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = QKVParallelLinear(HIDDEN, 32, 2, 2, bias=True)
        self.self_attn.o_proj = RowParallelLinear(HIDDEN, HIDDEN, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [intermediate] * 2, bias=False)
        self.mlp.down_proj = RowParallelLinear(intermediate, HIDDEN, bias=False)


class Model(nn.Module):
    num_weight_changes = 1

    def __init__(self, num_layers: int = 2, intermediate: int = INTERMEDIATE) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(intermediate) for _ in range(num_layers))
        self.model.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN)
        self.logits_processor = LogitsProcessor(VOCAB)
        for number, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def load(self) -> None:
        """What vLLM does once weights are loaded."""
        for _, module in self.named_modules():
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)


def config_of(kind: str, exit_layer: int, dtype: torch.dtype) -> SimpleNamespace:
    config = object.__new__(LayerSkipConfig)
    vars(config).update(
        draft_quantization=kind, draft_adapter=None, draft_vocab=None, exit_layer=exit_layer
    )
    return SimpleNamespace(speculative_config=config, model_config=SimpleNamespace(dtype=dtype))


def twin_of(
    kind: str = INT4, exit_layer: int = 1, dtype: torch.dtype = torch.float32, **sizes: int
) -> tuple[DraftTwin, Model]:
    with set_default_torch_dtype(dtype):
        model = Model(**sizes)
        return DraftTwin(model, config_of(kind, exit_layer, dtype)), model


def test_a_twin_is_made_of_the_first_layers_and_is_no_part_of_the_model():
    plain = Model()
    twin, model = twin_of(exit_layer=1)
    first = twin.layers[0]
    assert len(twin.layers) == 1
    assert first is not model.model.layers[0]
    assert first.norm is model.model.layers[0].norm, "modules without linear layers are shared"
    assert first.self_attn.qkv_proj is not model.model.layers[0].self_attn.qkv_proj
    assert len(twin.linears) == 4
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert model.state_dict().keys() == plain.state_dict().keys()
    ours = {id(linear.module) for linear in (*twin.linears, twin.head)}
    assert not ours & {id(module) for module in model.modules()}


def test_weights_are_made_when_vllm_processes_what_it_loaded():
    twin, model = twin_of(exit_layer=2)
    weights = [linear.target.weight.data.clone() for linear in (*twin.linears, twin.head)]
    assert not any(linear.module._parameters for linear in twin.linears)
    model.load()
    x = torch.randn(3, HIDDEN)
    for linear, weight in zip((*twin.linears, twin.head), weights, strict=True):
        x = torch.randn(3, weight.shape[1])
        y = linear.method.apply(linear.module, x)
        torch.testing.assert_close(y, x @ round_trip(weight, INT4).t(), rtol=1e-4, atol=1e-4)
    # The host's own forward, bias included.
    x = torch.randn(3, HIDDEN)
    qkv, target = twin.linears[0], model.model.layers[0].self_attn.qkv_proj
    y, _ = qkv.module(x)
    expected = x @ round_trip(weights[0], INT4).t() + target.bias
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    # The target is what it was.
    torch.testing.assert_close(target(x)[0], x @ weights[0].t() + target.bias, rtol=1e-4, atol=1e-4)


def test_weights_are_made_again_only_after_a_change(monkeypatch):
    # As on a GPU, where vLLM keeps a weight in full.
    keep = lambda self, layer: setattr(layer, "cpu_linear", nn.functional.linear)  # noqa: E731
    monkeypatch.setattr(
        "vllm.model_executor.layers.linear.UnquantizedLinearMethod.process_weights_after_loading",
        keep,
    )
    twin, model = twin_of()
    model.load()
    twin._num_weight_changes = model.num_weight_changes
    made = []
    make = TwinLinear.make
    monkeypatch.setattr(TwinLinear, "make", lambda self: made.append(self) or make(self))
    twin.refresh()
    assert not made
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    model.num_weight_changes += 1
    twin.refresh()
    twin.refresh()
    assert made == [*twin.linears, twin.head]
    (down_proj,) = [one for one in twin.linears if one.shape == (HIDDEN, INTERMEDIATE)]
    x = torch.randn(3, INTERMEDIATE)
    torch.testing.assert_close(
        down_proj.module(x)[0],
        x @ round_trip(model.model.layers[0].mlp.down_proj.weight, INT4).t(),
        rtol=1e-4,
        atol=1e-4,
    )


def fails(kind, num_outputs, num_inputs, dtype):
    raise ValueError("Failed to find a kernel:\n a unit is missing.")


def test_a_machine_without_a_kernel_is_found_out_at_the_start(monkeypatch):
    monkeypatch.setattr(draft_twin, "twin_method", fails)
    monkeypatch.setattr(draft_twin, "kinds_that_work", lambda dtype: [INT8, FP8])
    with pytest.raises(ValueError, match="^speculative_config: draft_quantization='int4'") as error:
        twin_of(dtype=torch.bfloat16)
    for words in (
        "no kernel",
        "bfloat16",
        "a unit is missing.",
        "Kinds that work here: int8, fp8.",
        "--draft-quantization",
        "'none'",
    ):
        assert words in str(error.value)
    monkeypatch.setattr(draft_twin, "kinds_that_work", lambda dtype: [])
    with pytest.raises(ValueError, match="Kinds that work here: none"):
        twin_of(dtype=torch.bfloat16)


def test_a_model_whose_sizes_fit_no_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(twin_linear, "twin_method", fails)
    with pytest.raises(ValueError, match="changes none of the layers that draft") as error:
        twin_of()
    assert "Set draft_quantization to another of int4, int8, fp8" in str(error.value)


@pytest.fixture
def log(monkeypatch):
    """Messages of the twin's logger; vLLM says each only once."""
    messages = []
    for module in (draft_twin, twin_linear):
        for method in ("warning_once", "info_once"):
            monkeypatch.setattr(
                module.logger, method, lambda text, *args: messages.append(text % args)
            )
    return messages


def test_a_layer_whose_size_fits_no_kernel_is_the_targets(monkeypatch, log):
    make = twin_linear.twin_method

    def picky(kind, num_outputs, num_inputs, dtype):
        if num_inputs == INTERMEDIATE:
            raise ValueError("128 inputs fit no kernel")
        return make(kind, num_outputs, num_inputs, dtype)

    monkeypatch.setattr(twin_linear, "twin_method", picky)
    twin, model = twin_of()
    assert twin.layers[0].mlp.down_proj is model.model.layers[0].mlp.down_proj
    assert (twin.num_full_width, len(twin.linears)) == (1, 3)
    assert any("down_proj at full width: 128 inputs fit" in message for message in log)


@pytest.mark.parametrize(
    ("twin_s", "is_slower"), [(0.9, False), (SLOWER - 0.05, False), (SLOWER + 0.05, True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_that_is_slower_than_full_width_is_said(monkeypatch, log, kind, twin_s, is_slower):
    if kind not in draft_twin.kinds_that_work(torch.bfloat16):
        pytest.skip(f"vLLM has no kernel for {kind} on this machine")
    twin, model = twin_of(kind, dtype=torch.bfloat16)
    model.load()
    seconds = iter([twin_s, 1.0])

    def timed(run):
        run()  # Both must run on what the machine has.
        return next(seconds)

    monkeypatch.setattr(draft_twin, "_seconds", timed)
    twin.after_load()
    warnings = [message for message in log if "slower than the target's own layers" in message]
    assert len(warnings) == is_slower
    if is_slower:
        assert f"in {kind} ({twin.linears[0].method.kernel_name})" in warnings[0]
        assert "draft_quantization='none'" in warnings[0]
    (started,) = [message for message in log if "linear layers" in message and "extra" in message]
    assert f"{twin.num_bytes} bytes of layers, {twin.num_head_bytes} bytes of LM head" in started
    assert 0 < twin.num_head_bytes < model.lm_head.weight.nbytes


def test_float32_is_said_to_save_nothing(log):
    twin, model = twin_of()
    model.load()
    twin.after_load()
    assert any("saves no time and no memory" in message for message in log)


class Packed(QuantizeMethodBase):
    """A quantised checkpoint's format, which nothing but its own kernel can read."""

    def create_weights(self, layer, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        layer.packed = 3 * layer.weight.data
        layer.weight = nn.Parameter(torch.empty(1), requires_grad=False)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.packed / 3, bias)


def test_a_quantised_targets_weight_is_what_its_layer_computes_with(monkeypatch):
    monkeypatch.setattr(twin_linear, "_UNIT_VECTORS", 24)  # A last piece that is shorter.
    layers = [RowParallelLinear(INTERMEDIATE, HIDDEN, bias=False) for _ in range(2)]
    method = Packed()
    for layer in layers:
        layer.weight.data.normal_(generator=torch.Generator().manual_seed(id(layer) % 97))
        layer.quant_method = method  # Some formats share one.
    weights = [layer.weight.data.clone() for layer in layers]
    twins = [TwinLinear(layer, INT8, torch.float32) for layer in layers]
    for twin in twins:
        assert twin.shape == (HIDDEN, INTERMEDIATE)
        twin.watch()
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, INTERMEDIATE)
    for twin, weight in zip(twins, weights, strict=True):
        y = twin.module(x)[0]
        torch.testing.assert_close(y, x @ round_trip(weight, INT8).t(), rtol=1e-3, atol=1e-3)
        assert twin.has_source


def test_a_load_format_that_processes_nothing(monkeypatch):
    """Then the hooks are not called, and the weights may still be there, or not."""
    twin, _ = twin_of()
    twin.after_load()
    assert all(linear.is_made for linear in (*twin.linears, twin.head))
    twin, model = twin_of()
    target = model.model.layers[0].mlp.down_proj
    target.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(ValueError, match="with this load_format vLLM leaves no weights"):
        twin.after_load()


def test_a_target_with_scales_of_its_own_for_activations_is_not_read():
    """A unit vector would be rounded by them."""
    model = Model()
    linear = model.model.layers[0].mlp.down_proj
    linear.input_scale = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(ValueError, match="rounds activations with scales"):
        TwinLinear(linear, INT4, torch.float32)
