# SPDX-License-Identifier: Apache-2.0
"""Sees where a live engine's calls wait for the device.

On a GPU the driver says so (``torch.cuda.set_sync_debug_mode``). On a CPU we pretend a device: the
host must not read what the runner, the speculator and the model keep as device tensors, nor what
is computed from those. It may read host tensors (vLLM calls them ``*_cpu*`` and ``*_np``).
Kernels, and CPU attention with its metadata, count as the device's own work.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Composites of such operators; inference mode does not take them apart.
_READING = {aten.item, aten.is_nonzero, aten.argwhere, aten.nonzero_numpy}
_TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}
_WALKED = ("vllm.v1.worker.gpu", "vllm_layerskip")


@dataclass
class HostReads:
    """What was seen in one engine."""

    calls: set[str] = field(default_factory=set)
    """Names of the watched functions that ran."""
    reads: dict[str, str] = field(default_factory=dict)
    """By the line that reads: the operation and the lines that led there."""

    def add(self, operation: object) -> None:
        places = [
            f"{frame.filename}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and frame.filename != __file__
        ]
        self.reads[places[-1]] = f"{operation} < {' < '.join(places[-2:-7:-1])}"


@contextlib.contextmanager
def watch(engine: Any) -> Iterator[HostReads]:
    """Watch drafting, verify planning and the forward of an engine for the block.

    In an engine without a speculator only the rest is watched.
    """
    runner = engine.runner
    seen = HostReads()
    recording = _on_a_gpu if torch.cuda.is_available() else _on_a_pretended_device
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (runner.speculator, "propose"),
            (runner.model_state, "prepare_attn"),
            (runner.model_state, "prepare_inputs"),
            (runner.model, "forward"),
        ):
            if owner is None:
                continue
            watched = _watched(getattr(owner, name), seen, recording, runner)
            stack.enter_context(mock.patch.object(owner, name, watched))
        if not torch.cuda.is_available():
            stack.enter_context(_device_work_is_not_watched())
        yield seen


def _watched(
    function: Callable[..., Any], seen: HostReads, recording: Callable[..., Any], runner: Any
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.calls.add(function.__name__)
        with recording(seen, (runner, args, kwargs)):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _on_a_gpu(seen: HostReads, device_objects: object) -> Iterator[None]:
    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            seen.add(message)

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def _on_a_pretended_device(seen: HostReads, device_objects: object) -> Iterator[None]:
    device = _PretendedDevice(device_objects)
    with _Operators(seen, device), _Methods(seen, device):
        yield


class _PretendedDevice:
    """Knows the tensors of the device by their memory."""

    def __init__(self, device_objects: object) -> None:
        self._memory: dict[int, torch.Tensor] = {}
        self._walked: set[int] = set()
        self._walk(device_objects)

    def _walk(self, value: object) -> None:
        if isinstance(value, torch.Tensor):
            self.add(value)
        elif isinstance(value, dict):
            for name, part in value.items():
                if not _is_host_name(name):
                    self._walk(part)
        elif isinstance(value, list | tuple):
            for part in value:
                self._walk(part)
        elif isinstance(value, torch.nn.Module):
            self._walk([*value.parameters(), *value.buffers()])
            self._walk(vars(value).get("draft_state"))
        elif type(value).__module__.startswith(_WALKED) and id(value) not in self._walked:
            self._walked.add(id(value))
            self._walk(vars(value))

    def add(self, tensor: torch.Tensor) -> None:
        # Kept, so that no host tensor gets its memory while the call lasts.
        self._memory[tensor.untyped_storage().data_ptr()] = tensor

    def has(self, *values: Any) -> bool:
        return any(
            leaf.numel() > 0 and leaf.untyped_storage().data_ptr() in self._memory
            for leaf in tree_leaves(values)
            if isinstance(leaf, torch.Tensor)
        )


def _is_host_name(name: object) -> bool:
    return isinstance(name, str) and bool({"cpu", "np"} & set(name.split("_")))


class _Operators(TorchDispatchMode):
    """Operators whose result's value or shape the host has to know."""

    def __init__(self, seen: HostReads, device: _PretendedDevice) -> None:
        super().__init__()
        self.seen, self.device = seen, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.device.has(args, kwargs):
            return func(*args, **kwargs)
        if _reads(func, args, kwargs):
            self.seen.add(func)
        outputs = func(*args, **kwargs)
        for leaf in tree_leaves((outputs, args if func._schema.is_mutable else ())):
            if isinstance(leaf, torch.Tensor):
                self.device.add(leaf)
        return outputs


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        return bool(masks)
    if func.overloadpacket is aten.repeat_interleave:
        by_number = func is aten.repeat_interleave.self_int
        return not by_number and kwargs.get("output_size") is None
    if func.overloadpacket in _READING or func is aten.where.default:
        return True
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class _Methods(TorchFunctionMode):
    """Methods that copy to the host, and that are no operators where the device is pretended."""

    def __init__(self, seen: HostReads, device: _PretendedDevice) -> None:
        super().__init__()
        self.seen, self.device = seen, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_host = func in _TO_HOST or (func is torch.Tensor.to and "cpu" in tree_leaves(args[1:]))
        if to_host and not kwargs.get("non_blocking") and self.device.has(args[0]):
            self.seen.add(func)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _device_work_is_not_watched() -> Iterator[None]:
    from triton.runtime import interpreter
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.attention.backends import cpu_attn

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (interpreter.GridExecutor, "__call__"),
            (KernelOverride, "_launch"),
            (cpu_attn.CPUAttentionMetadataBuilder, "build"),
            (cpu_attn.CPUAttentionBackendImpl, "forward"),
        ):
            unwatched = _unwatched(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, unwatched))
        yield


def _unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call
