# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: a tape of kernel launches in place of ``torch.cuda.CUDAGraph``.

A graph replays kernels on the addresses of its capture and runs no Python. The tape does the
same: it records every operator and every Triton launch with its tensors, replays them into
the tensors of the capture, and then spoils what was allocated during the capture, as another
graph of the same pool might. These show up here as wrong tokens or as an error: what only a live
step's Python computes, a pointer that is not persistent, a host value that goes stale, a read of
a graph's memory after the graph's end, and a wait for the device during capture.

vLLM's graph managers capture, pad, dispatch and replay as they do on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import (
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.warmup import warmup_kernels

aten = torch.ops.aten
_HOST_READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}

_recording: list[StandInGraph] = []


@dataclass
class _Launch:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    allocated: list[torch.Tensor]
    context: Any


class StandInGraph:
    """A ``torch.cuda.CUDAGraph`` that is a tape."""

    def __init__(self) -> None:
        self.launches: list[_Launch] = []

    def record(
        self, function: Callable, args: tuple, kwargs: dict, outputs: Any, mutates: bool
    ) -> None:
        inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        allocated = [
            tensor
            for tensor in _tensors(outputs)
            if tensor.untyped_storage().data_ptr() not in inputs
        ]
        if not (allocated or mutates):
            return  # A view launches nothing.
        context = get_forward_context() if is_forward_context_available() else None
        self.launches.append(_Launch(function, args, kwargs, outputs, allocated, context))

    def replay(self) -> None:
        for launch in self.launches:
            with override_forward_context(launch.context):
                outputs = launch.function(*launch.args, **launch.kwargs)
            for new, captured in zip(_tensors(outputs), _tensors(launch.outputs), strict=True):
                if new.data_ptr() != captured.data_ptr():
                    captured.copy_(new)
        for launch in self.launches:
            for tensor in launch.allocated:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: StandInGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST_READS:
            raise RuntimeError(f"{func} waits for the device during a graph capture")
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        self.graph.record(func, args, kwargs, outputs, func._schema.is_mutable)
        return outputs


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """One launch, whatever it computes inside, host reads included."""

    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        if _get_current_dispatch_mode() is None:  # Not recording, or inside of an operator.
            return function(*args, **kwargs)
        with _disable_current_modes():
            outputs = function(*args, **kwargs)
        _recording[-1].record(function, args, kwargs, outputs, mutates=True)
        return outputs

    return launch


@contextlib.contextmanager
def _capture_graph(graph: StandInGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    assert not _recording, "captures do not nest"
    _recording.append(graph)
    try:
        with _Recorder(graph):
            yield
    finally:
        _recording.pop()


def _build_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """CPU_ATTN schedules its work on the host; a GPU's kernel does so on the device."""

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = original(self, *args, **kwargs)
        metadata.build_again = functools.partial(original, self, *args, **kwargs)
        return metadata

    return build


def _attend(original: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if metadata is not None:
            metadata = metadata.build_again()
        return original(self, layer, query, key, value, kv_cache, metadata, *args, **kwargs)

    return _as_kernel(attend)


@contextlib.contextmanager
def stand_in_graphs() -> Iterator[None]:
    """Graphs that vLLM captures and replays in this block are tapes."""
    builder, impl = cpu_attn.CPUAttentionMetadataBuilder, cpu_attn.CPUAttentionBackendImpl
    nothing = contextlib.nullcontext
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (torch.cuda, "CUDAGraph", StandInGraph),
            (torch.cuda, "graph", _capture_graph),
            (cudagraph_utils, "graph_capture", lambda device: nothing()),
            (cudagraph_utils, "capture_pool", lambda *args: nothing()),
            (cudagraph_utils, "current_stream", lambda: None),
            (cudagraph_utils, "capture_outside_cumem_pool", nothing),
            (cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None),
            (cudagraph_utils.current_platform, "graph_pool_handle", lambda: None),
            (builder, "build", _build_metadata(builder.build)),
            (builder, "_cudagraph_support", AttentionCGSupport.ALWAYS),
            (builder, "supports_draft_decode_metadata_update", True),
            (builder, "update_draft_decode_metadata", lambda self, metadata: None),
            (impl, "forward", _attend(impl.forward)),
            (interpreter.GridExecutor, "__call__", _as_kernel(interpreter.GridExecutor.__call__)),
            (KernelOverride, "_launch", _as_kernel(KernelOverride._launch)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
        yield


def capture(runner: Any, capture_sizes: list[int]) -> None:
    """What vLLM's worker does on a GPU whose attention supports full decode graphs."""
    mode = CUDAGraphMode.FULL_DECODE_ONLY
    _ask_for_graphs(runner, mode, capture_sizes)
    runner.cudagraph_manager = cudagraph_utils.ModelCudaGraphManager(
        runner.vllm_config, runner.device, mode, decode_query_len=runner.decode_query_len
    )
    if runner.speculator is not None:
        runner.speculator._configure_decode_metadata_update()
        runner.speculator.init_cudagraph_manager(mode)
    with _no_accelerator():
        runner.capture_model(profile_only=True)


def start_as_on_a_gpu(worker: Any, capture_sizes: list[int]) -> None:
    """All that vLLM's worker does on a GPU between loading and serving (on a CPU it does little).

    Graphs are captured in a throw-away KV cache to measure them, and dropped; the KV cache
    is made anew; kernels are warmed up by a few steps; graphs are captured for good.
    """
    runner = worker.model_runner
    kv_cache_config = runner.kv_cache_config
    num_gpu_blocks = runner.cache_config.num_gpu_blocks
    _ask_for_graphs(runner, CUDAGraphMode.FULL_DECODE_ONLY, capture_sizes)
    with _no_accelerator():
        cudagraph_utils.profile_cudagraph_memory(runner)
        runner.cache_config.num_gpu_blocks = num_gpu_blocks
        runner.initialize_kv_cache(kv_cache_config)
        warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
        runner.capture_model(profile_only=True)


def _ask_for_graphs(runner: Any, mode: CUDAGraphMode, capture_sizes: list[int]) -> None:
    config = runner.vllm_config.compilation_config
    config.cudagraph_mode = mode
    config.cudagraph_capture_sizes = capture_sizes
    config.max_cudagraph_capture_size = max(capture_sizes)


@contextlib.contextmanager
def _no_accelerator() -> Iterator[None]:
    # For this block only: vLLM's CPU worker replaces these functions for good.
    with (
        mock.patch.object(torch.accelerator, "empty_cache"),
        mock.patch.object(torch.accelerator, "synchronize"),
        mock.patch.object(torch.accelerator, "get_memory_info", return_value=(0, 0)),
    ):
        yield
