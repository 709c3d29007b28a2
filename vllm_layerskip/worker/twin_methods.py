# SPDX-License-Identifier: Apache-2.0
"""How a twin's linear layer computes: one quantisation method of vLLM's for each kind of weight.

Each method rounds a weight (``twins/rounding.py``), brings it into the format that vLLM's own
kernels take from checkpoints of that kind (compressed-tensors' names and layouts), and lets vLLM
choose, repack and run the kernel.

Weights are made more than once: at the start, and whenever the target's weights change. Every
tensor is written in place then, since a CUDA graph may hold it.

Shapes: N outputs, M inputs of this rank's shard, G groups of a row, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels.linear import (
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
    init_fp8_linear_kernel,
    init_int8_linear_kernel,
)
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    pack_quantized_values_into_int32,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_layerskip.twins.kinds import FP8, INT4, INT8, KINDS, NONE, group_sizes_of
from vllm_layerskip.twins.rounding import (
    ROWS_AT_ONCE,
    round_fp8,
    round_int4,
    round_int8,
    round_trip,
)

_NIBBLES = 8  # 4-bit values in an int32.
_CPU_BLOCK = 32  # Of vLLM's 8-bit kernels of a CPU.


class TwinMethod(LinearMethodBase):
    """The quantisation method of one of a twin's linear layers.

    Args:
        num_outputs: N.
        num_inputs: M.
        dtype: of activations and of the target's weights.

    Raises:
        ValueError: vLLM has no kernel for the kind and these sizes on this machine.
    """

    num_bytes = 0
    """Of the last weight that was made."""
    kernel_name = "torch"

    def __init__(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
        self.num_outputs, self.num_inputs, self.dtype = num_outputs, num_inputs, dtype

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a twin's weights are made from the target's: see make_weights")

    def make_weights(
        self,
        layer: nn.Module,
        weight: torch.Tensor,  # [N, M]
        bias: torch.Tensor | None,  # [N]
    ) -> None:
        """Make ``layer``'s tensors from a weight, in place if it has them already."""
        # A draft step runs in inference mode, and its tensors could not be written later.
        with torch.inference_mode(False), torch.no_grad():
            self._make_weights(layer, weight, bias)

    def _make_weights(
        self, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        made = nn.Module()
        # Kernels of vLLM may change a layer's bias, also its dtype; this one is the twin's own.
        own_bias = None if bias is None else _parameter(bias.to(self.dtype, copy=True))
        made.register_parameter("bias", own_bias)
        made.logical_widths = [self.num_outputs]
        made.input_size_per_partition = self.num_inputs
        made.output_size_per_partition = self.num_outputs
        made.orig_dtype = made.params_dtype = self.dtype
        with set_default_torch_dtype(self.dtype), weight.device:
            self._make(made, weight)
        # A kernel may keep more than it was given, or keep it elsewhere.
        tensors = [*made.parameters(), *made.buffers(), *vars(made).values()]
        held = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t is not made.bias)
        self.num_bytes = max(self.num_bytes, held)
        _adopt(layer, made)

    @abstractmethod
    def _make(self, made: nn.Module, weight: torch.Tensor) -> None:
        """Give ``made`` what the kernel reads."""

    def _count(self, *tensors: torch.Tensor | None) -> None:
        """What the kernel is given."""
        self.num_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)


class FullWidth(TwinMethod):
    """Weights of the target's own dtype, which vLLM runs as it runs the target's.

    With a kind, they are rounded to it and back: a reference, with the kind's weights and exact
    arithmetic, and without its speed.
    """

    kernel_name = "full width"

    def __init__(
        self, num_outputs: int, num_inputs: int, dtype: torch.dtype, kind: str = NONE
    ) -> None:
        super().__init__(num_outputs, num_inputs, dtype)
        self.kind = kind
        self._unquantized = UnquantizedLinearMethod()

    def _make(self, made: nn.Module, weight: torch.Tensor) -> None:
        weight = weight.clone() if self.kind == NONE else round_trip(weight, self.kind)
        made.register_parameter("weight", _parameter(weight))
        self._count(weight)
        self._unquantized.process_weights_after_loading(made)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._unquantized.apply(layer, x, bias)


class _KernelMethod(TwinMethod):
    """A method that one of vLLM's kernels computes."""

    kernel: Any

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)


class Int4(_KernelMethod):
    """4-bit weights in groups, activations of the model's dtype (or what the kernel makes them)."""

    def __init__(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
        super().__init__(num_outputs, num_inputs, dtype)
        self._config, self._kernel_type = self._choose()
        self.kernel_name = self._kernel_type.__name__

    def _choose(self) -> tuple[MPLinearLayerConfig, type]:
        """The first of our formats that vLLM has a kernel for."""
        problem = f"{self.num_inputs} inputs cannot be cut into groups"
        for symmetric in (False, True):
            for group_size in group_sizes_of(self.num_inputs):
                config = MPLinearLayerConfig(
                    full_weight_shape=(self.num_inputs, self.num_outputs),
                    partition_weight_shape=(self.num_inputs, self.num_outputs),
                    weight_type=scalar_types.uint4b8 if symmetric else scalar_types.uint4,
                    act_type=self.dtype,
                    group_size=group_size,
                    zero_points=not symmetric,
                )
                try:
                    return config, choose_mp_linear_kernel(config)
                except ValueError as error:
                    problem = str(error)
        raise ValueError(problem)

    def _rounded_and_packed(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Packed values and scales of some rows, and packed zero points if there are any."""
        config = self._config
        rounded = round_int4(rows, config.group_size, symmetric=not config.zero_points)
        # Packing is the same for uint4b8, whose zero point is 8.
        result = _pack(rounded.values, packed_dim=1), rounded.scales.to(self.dtype)
        if not config.zero_points:
            return result
        assert rounded.zero_points is not None
        return *result, _pack(rounded.zero_points, packed_dim=0)

    def _make(self, made: nn.Module, weight: torch.Tensor) -> None:
        config = self._config
        # Some rows at a time: packing needs an int32 for each value.
        parts = [self._rounded_and_packed(rows) for rows in weight.split(ROWS_AT_ONCE)]
        packed, scale_values, *zeros = (torch.cat(part) for part in zip(*parts, strict=True))
        made.register_parameter("weight_packed", _packed_parameter(packed, packed_dim=1))
        scales = GroupQuantScaleParameter(
            data=scale_values, input_dim=1, output_dim=0, weight_loader=_not_loaded
        )
        made.register_parameter("weight_scale", scales)
        for zero_points in zeros:
            made.register_parameter(
                "weight_zero_point", _packed_parameter(zero_points, packed_dim=0)
            )
        self._count(packed, scales, *zeros)
        self.kernel = self._kernel_type(
            config, "weight_packed", "weight_scale", "weight_zero_point"
        )
        self.kernel.process_weights_after_loading(made)
        if getattr(made, "use_w4a8", False):
            self.kernel_name = f"{self._kernel_type.__name__}, W4A8"


class Int8(_KernelMethod):
    """8-bit weights with a scale per output; the kernel rounds activations token by token."""

    def __init__(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
        super().__init__(num_outputs, num_inputs, dtype)
        if current_platform.is_cpu():
            _require_cpu_sizes("INT8", num_outputs, num_inputs)
            if dtype != torch.bfloat16:
                raise ValueError("vLLM's INT8 kernel of a CPU takes bfloat16 activations alone.")
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name="LayerSkip's draft twin",
        )
        self.kernel_name = type(self.kernel).__name__

    def _make(self, made: nn.Module, weight: torch.Tensor) -> None:
        rounded = round_int8(weight)
        made.register_parameter("weight", _parameter(rounded.values))
        made.register_parameter("weight_scale", _parameter(rounded.scales))
        for name in ("input_scale", "input_zero_point", "azp_adj"):
            made.register_parameter(name, None)
        self._count(rounded.values, rounded.scales)
        # A kernel may hold what it packed itself; the next one is of the same class.
        self.kernel = type(self.kernel)(self.kernel.config, self.kernel.layer_param_names)
        self.kernel.process_weights_after_loading(made)


class Fp8(_KernelMethod):
    """E4M3 weights.

    On a GPU with a scale per output, and activations that the kernel rounds token by token. vLLM's
    kernel of an x86 CPU takes one scale for the whole weight, and leaves activations as they are.
    """

    def __init__(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
        super().__init__(num_outputs, num_inputs, dtype)
        self._per_output = not current_platform.is_cpu()
        self.kernel = init_fp8_linear_kernel(
            activation_quant_key=kFp8DynamicTokenSym if self._per_output else kFp8DynamicTensorSym,
            weight_quant_key=kFp8StaticChannelSym if self._per_output else kFp8StaticTensorSym,
            input_dtype=dtype,
            out_dtype=dtype,
            weight_shape=(num_outputs, num_inputs),
            module_name="LayerSkip's draft twin",
        )
        self.kernel_name = type(self.kernel).__name__
        if current_platform.is_cpu():
            self._require_cpu_kernel()

    def _require_cpu_kernel(self) -> None:
        if "Torch" in self.kernel_name:
            raise ValueError(
                f"vLLM has no fast FP8 kernel for this CPU and dtype, only {self.kernel_name}, "
                "which is far slower than full width. It needs AMX and bfloat16."
            )
        _require_cpu_sizes("FP8", self.num_outputs, self.num_inputs)

    def _make(self, made: nn.Module, weight: torch.Tensor) -> None:
        rounded = round_fp8(weight, self._per_output)
        scales = rounded.scales if self._per_output else rounded.scales.view(())
        # Kernels take the weight as [M, N], each output contiguous.
        made.register_parameter("weight", _parameter(rounded.values.t()))
        made.register_parameter("weight_scale", _parameter(scales))
        for name in ("input_scale", "input_scale_ub"):
            made.register_parameter(name, None)
        self._count(rounded.values, scales)
        self.kernel.process_weights_after_loading(made)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if bias is None or self._per_output:
            return super().apply(layer, x, bias)
        # vLLM's kernel of an x86 CPU takes no bias of the model's dtype.
        return super().apply(layer, x) + bias


USUAL_SIZE = 4096
"""Inputs and outputs of a linear layer that any kernel takes."""
_METHODS: dict[str, type[TwinMethod]] = {INT4: Int4, INT8: Int8, FP8: Fp8}


def twin_method(kind: str, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> TwinMethod:
    """The method of a kind of weight, for a linear layer of these sizes.

    In float32 it is the reference (``FullWidth``): exact arithmetic is what float32 is asked for.

    Raises:
        ValueError: vLLM has no kernel for it on this machine.
    """
    if kind == NONE or dtype == torch.float32:
        return FullWidth(num_outputs, num_inputs, dtype, kind)
    return _METHODS[kind](num_outputs, num_inputs, dtype)


def kinds_that_work(dtype: torch.dtype) -> list[str]:
    """The kinds that vLLM has a kernel for on this machine, for a linear layer of usual size."""
    found = []
    for kind in KINDS:
        try:
            twin_method(kind, USUAL_SIZE, USUAL_SIZE, dtype)
        except (ValueError, NotImplementedError):
            continue
        found.append(kind)
    return found


def _require_cpu_sizes(kind: str, num_outputs: int, num_inputs: int) -> None:
    """vLLM's kernels of a CPU check some of their sizes only when they pack a weight."""
    if num_outputs % _CPU_BLOCK or num_inputs % _CPU_BLOCK:
        raise ValueError(
            f"vLLM's {kind} kernel of a CPU takes multiples of {_CPU_BLOCK} inputs and outputs, "
            f"and this layer has {num_inputs} and {num_outputs}."
        )


def _pack(values: torch.Tensor, packed_dim: int) -> torch.Tensor:
    return pack_quantized_values_into_int32(values.int(), scalar_types.uint4, packed_dim)


def _parameter(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def _packed_parameter(data: torch.Tensor, packed_dim: int) -> PackedvLLMParameter:
    return PackedvLLMParameter(
        data=data,
        input_dim=1,
        output_dim=0,
        packed_dim=packed_dim,
        packed_factor=_NIBBLES,
        weight_loader=_not_loaded,
    )


def _not_loaded(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("a twin's weights are made from the target's, not loaded")


def _adopt(layer: nn.Module, made: nn.Module) -> None:
    """Give ``layer`` everything that ``made`` has; tensors that it has already keep their place."""
    for name, parameter in made._parameters.items():
        old = layer._parameters.get(name)
        if (
            old is not None
            and parameter is not None
            and (old.shape, old.dtype, old.stride())
            == (parameter.shape, parameter.dtype, parameter.stride())
        ):
            old.copy_(parameter)
        else:
            layer._parameters[name] = parameter
    own = vars(nn.Module())
    for name, value in vars(made).items():
        if name in own:
            continue
        old = vars(layer).get(name)
        if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor):
            old.copy_(value)
        else:
            setattr(layer, name, value)
