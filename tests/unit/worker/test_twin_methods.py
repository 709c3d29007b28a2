# SPDX-License-Identifier: Apache-2.0
"""Each kind of a twin's weight in vLLM's own kernel, against its dequantised weight.

A kind that this machine has no kernel for is skipped by name. Catches a weight or a scale in
another layout than the kernel reads, and tensors that move when weights are made again.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.platforms import current_platform

from vllm_layerskip.twins.kinds import FP8, INT4, INT8, KINDS, NONE, group_sizes_of
from vllm_layerskip.twins.rounding import round_fp8, round_int4, round_int8, round_trip
from vllm_layerskip.worker import twin_methods
from vllm_layerskip.worker.twin_methods import FullWidth, kinds_that_work, twin_method

BFLOAT16 = torch.bfloat16
SHAPES = [(192, 128), (64, 512), (576, 1536)]
"""N outputs, M inputs."""
# Relative to the norm of the output. Beside the sum in bfloat16, int4 and int8 kernels may round
# activations to 8 bits, token by token: half a step of 1/127 of the largest of some M normal
# values, and as for fp8, on a GPU, to three bits of mantissa.
BOUNDS = {NONE: 0.005, INT4: 0.02, INT8: 0.02, FP8: 0.005 if current_platform.is_cpu() else 0.05}
DEVICE = "cpu" if current_platform.is_cpu() else "cuda"

pytestmark = pytest.mark.usefixtures("one_rank")


def dequantized(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What a kernel's weights stand for, in float32."""
    if kind == INT4:
        return round_int4(weight, group_sizes_of(weight.shape[1])[0]).dequantize()
    if kind == INT8:
        return round_int8(weight).dequantize()
    if kind == FP8:
        return round_fp8(weight, per_output=not current_platform.is_cpu()).dequantize()
    return weight.float()


def require(kind: str) -> None:
    if kind != NONE and kind not in kinds_that_work(BFLOAT16):
        pytest.skip(f"vLLM has no kernel for {kind} on this machine")


def weight_of(num_outputs: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.02
    weight[3, 5] = 0.3  # An outlier costs its group or its row, and no other.
    return weight.to(DEVICE, BFLOAT16)


def inputs_of(num_inputs: int, num_tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, num_inputs, generator=generator).to(DEVICE, BFLOAT16)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [NONE, *KINDS])
def test_a_kernel_computes_with_the_dequantised_weight(kind, shape, with_bias):
    require(kind)
    weight, x = weight_of(*shape), inputs_of(shape[1])
    bias = torch.linspace(-1, 1, shape[0]).to(weight) if with_bias else None
    method, layer = twin_method(kind, *shape, BFLOAT16), nn.Module()
    method.make_weights(layer, weight, bias)
    own_bias = layer._parameters["bias"]
    with torch.inference_mode():
        y = method.apply(layer, x, own_bias)
        one = method.apply(layer, x[:1], own_bias)
    assert (y.shape, y.dtype) == ((5, shape[0]), BFLOAT16)
    expected = x.float() @ dequantized(weight, kind).t()
    if bias is not None:
        expected += bias.float()
        assert own_bias.data_ptr() != bias.data_ptr(), "kernels may change a bias"
    assert relative_error(y, expected) < BOUNDS[kind]
    assert relative_error(one, expected[:1]) < BOUNDS[kind]
    if kind == INT4 and bias is None:
        # The control: the bound tells the rounded weight from the full one.
        assert relative_error(y, x.float() @ weight.float().t()) > 2 * BOUNDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_made_again_stay_in_place(kind):
    """Where the kernel keeps its tensors on the layer, a graph that holds them sees new values."""
    require(kind)
    shape = (192, 128)
    method, layer = twin_method(kind, *shape, BFLOAT16), nn.Module()
    bias = torch.linspace(-1, 1, shape[0]).to(DEVICE, BFLOAT16)
    x = inputs_of(shape[1])
    method.make_weights(layer, weight_of(*shape), bias)
    before = {
        name: parameter.data_ptr()
        for name, parameter in layer._parameters.items()
        if parameter is not None
    }
    assert before
    second = weight_of(*shape, seed=1)
    method.make_weights(layer, second, 2 * bias.float())  # As a kernel of the target's left it.
    with torch.inference_mode():
        y = method.apply(layer, x, layer._parameters["bias"])
    expected = x.float() @ dequantized(second, kind).t() + 2 * bias.float()
    assert relative_error(y, expected) < BOUNDS[kind]
    assert before == {name: layer._parameters[name].data_ptr() for name in before}


@pytest.mark.parametrize(("kind", "most"), [(INT4, 0.28), (INT8, 0.52), (FP8, 0.52), (NONE, 1.0)])
def test_the_bytes_of_a_weight_are_counted(kind, most):
    require(kind)
    weight = weight_of(576, 1536)
    method = twin_method(kind, 576, 1536, BFLOAT16)
    method.make_weights(nn.Module(), weight, None)
    # vLLM's W4A8 kernel keeps scales in float32, and sums of the weights.
    most = 0.33 if "W4A8" in method.kernel_name else most
    assert 0.9 * most < method.num_bytes / weight.nbytes <= most


def test_what_a_kernel_keeps_is_counted():
    """After packing, not before."""
    require(INT4)
    method, layer = twin_method(INT4, 576, 1536, BFLOAT16), nn.Module()
    method.make_weights(layer, weight_of(576, 1536), None)
    assert method.num_bytes == sum(tensor.nbytes for tensor in layer.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels of a CPU")
@pytest.mark.parametrize(
    ("kind", "sizes", "dtype", "says"),
    [
        (INT8, (48, 64), BFLOAT16, "multiples of 32"),
        (FP8, (64, 176), BFLOAT16, "multiples of 32"),
        (INT8, (64, 64), torch.float16, "bfloat16"),
        (FP8, (64, 64), torch.float16, "no fast FP8 kernel"),
    ],
)
def test_what_a_cpus_kernels_cannot_do_is_known_before_weights_are_there(kind, sizes, dtype, says):
    """vLLM's own checks come late, and one of them ends the process."""
    with pytest.raises(ValueError, match=says):
        twin_method(kind, *sizes, dtype)


def test_large_weights_are_packed_as_small_ones_are(monkeypatch):
    require(INT4)
    weight, layers = weight_of(96, 128), (nn.Module(), nn.Module())
    for rows, layer in zip((4096, 32), layers, strict=True):
        monkeypatch.setattr(twin_methods, "ROWS_AT_ONCE", rows)
        twin_method(INT4, 96, 128, BFLOAT16).make_weights(layer, weight, None)
    for name, parameter in layers[0].named_parameters():
        assert torch.equal(parameter, layers[1]._parameters[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_reference(kind):
    weight = weight_of(96, 160).float()
    method, layer = twin_method(kind, 96, 160, torch.float32), nn.Module()
    assert isinstance(method, FullWidth)
    method.make_weights(layer, weight, None)
    x = inputs_of(160).float()
    y = method.apply(layer, x)
    torch.testing.assert_close(y, x @ round_trip(weight, kind).t(), rtol=1e-5, atol=1e-5)
    assert relative_error(y, x @ weight.t()) > 1e-3


def test_the_target_keeps_its_weight_and_bias():
    for kind in (NONE, *kinds_that_work(BFLOAT16)):
        weight, bias = weight_of(192, 128), torch.ones(192, device=DEVICE, dtype=BFLOAT16)
        kept = weight.clone()
        method, layer = twin_method(kind, 192, 128, BFLOAT16), nn.Module()
        method.make_weights(layer, weight, bias)
        assert torch.equal(weight, kept), kind
        assert torch.equal(bias, torch.ones_like(bias)), kind
        assert bias.dtype == BFLOAT16, kind


def test_inputs_that_fit_no_group_have_no_int4_kernel():
    with pytest.raises(ValueError, match="100 inputs cannot be cut into groups"):
        twin_method(INT4, 64, 100, BFLOAT16)


def test_the_kinds_that_work_are_those_with_a_kernel(monkeypatch):
    assert kinds_that_work(torch.float32) == list(KINDS)

    class NoKernel:
        def __init__(self, *args):
            raise NotImplementedError("no such unit")

    class NoShape:
        def __init__(self, *args):
            raise ValueError("no such shape")

    works = FullWidth
    monkeypatch.setattr(twin_methods, "_METHODS", {INT4: NoKernel, INT8: NoShape, FP8: works})
    assert kinds_that_work(BFLOAT16) == [FP8]
