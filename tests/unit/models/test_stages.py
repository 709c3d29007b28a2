# SPDX-License-Identifier: Apache-2.0
"""What a GPU uses of the two stages besides their layers: the exit norm's kernel, the buffer that
piecewise graphs read, and the compiled units that vLLM looks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.ir import ops

from vllm_layerskip.models.stages import (
    Decoder,
    LayerSkipForCausalLM,
    _late_stage_inputs,
    fused_norms,
)


class Norm:
    """Llama's last norm, which asks vLLM's operator."""

    def __call__(self, hidden_states, residual):
        weight = torch.ones(hidden_states.shape[-1])
        return ops.fused_add_rms_norm.maybe_inplace(hidden_states, residual, weight, 1e-6)


@pytest.fixture
def fused_calls(monkeypatch):
    """vLLM's fused kernel of a GPU, in torch; on a CPU it cannot run."""
    calls = []
    norm = ops.fused_add_rms_norm
    native, fused = norm.impls["native"], norm.impls["vllm_c"]

    def kernel(*args):
        calls.append(args)
        return native.impl_fn(*args)

    monkeypatch.setattr(fused, "supported", True)
    monkeypatch.setattr(fused, "impl_fn", kernel)
    return calls


def test_the_exit_norm_is_one_kernel_where_vllm_has_one(fused_calls):
    """vLLM's default under torch.compile is eleven kernels, which Inductor cannot fuse here."""
    model = LayerSkipForCausalLM.__new__(LayerSkipForCausalLM)
    nn.Module.__init__(model)
    model.__dict__["model"] = SimpleNamespace(norm=Norm())
    hidden_states, residual = torch.randn(2, 3, 16)
    with ops.fused_add_rms_norm.set_priority(["native"]):
        expected = Decoder.final_norm(model, hidden_states.clone(), residual.clone())
        assert not fused_calls
        normed = model.exit_norm(hidden_states.clone(), residual.clone())
        assert len(fused_calls) == 1
        # The late stage's norm is compiled with the rest of it.
        Decoder.final_norm(model, hidden_states.clone(), residual.clone())
        assert len(fused_calls) == 1
    torch.testing.assert_close(normed, expected)


def test_a_platform_without_the_kernel_keeps_its_norms():
    before = ops.fused_add_rms_norm.get_priority()
    with fused_norms():
        assert ops.fused_add_rms_norm.get_priority() == ["native"]
    assert ops.fused_add_rms_norm.get_priority() == before


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY"])
@pytest.mark.parametrize("max_size", [512, 0, None])
def test_late_stages_inputs_are_there_whatever_mode_was_asked_for(mode, max_size):
    """After the model is built, vLLM may turn FULL modes to piecewise for the attention's sake."""
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode[mode], max_cudagraph_capture_size=max_size
        ),
        model_config=SimpleNamespace(get_hidden_size=lambda: 8, dtype=torch.float16),
    )
    assert _late_stage_inputs(vllm_config).shape == (2, max_size or 0, 8)


def test_vllm_finds_the_compiled_stages_and_no_weight_twice():
    model = LayerSkipForCausalLM.__new__(LayerSkipForCausalLM)
    nn.Module.__init__(model)
    assert list(model.modules()) == [model], "while it is built"
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    stages = nn.ModuleList(model.layers), nn.ModuleList()
    model._stages = stages
    assert [module for module in model.modules() if module in stages] == list(stages)
    assert [name for name, _ in model.named_parameters()] == ["layers.0.weight", "layers.0.bias"]
    assert sum(module is model.layers[0] for module in model.modules()) == 1
