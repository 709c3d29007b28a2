# SPDX-License-Identifier: Apache-2.0
"""Early and late stage in vLLM's own compile backend, in a process of its own.

vLLM's CPU platform turns compile mode 3 into a plain ``torch.compile``. Here it does not: graphs
are split at attention, pieces go through vLLM's Inductor backend, its cache and its graph wrapper,
as on a GPU. What a CPU lacks is the CUDA graph inside of the wrapper; ``PieceGraphs`` stands in.

There is no engine, because on a CPU none runs piecewise graphs. The model is called as a runner
calls it, and attention, an operator between the pieces, works without a KV cache.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import vllm.ir
from torch._dynamo import convert_frame
from torch.utils._pytree import tree_leaves
from vllm.compilation.counter import compilation_counter
from vllm.compilation.passes import pass_manager
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import BatchDescriptor, get_forward_context, set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_layerskip.models.stages import LayerSkipForCausalLM

MAX_NUM_TOKENS = 64


class PieceGraphs:
    """vLLM's ``CUDAGraphWrapper`` of one compiled piece, without CUDA: a "graph" per batch size.

    Like a CUDA graph, it insists on the input addresses of its capture and leaves its outputs in
    the memory of its capture. The wrapper refers only weakly to the outputs of a unit's last piece:
    they become NaN as soon as another graph runs, since all graphs share one pool of memory.
    """

    counts: ClassVar[Counter[str]] = Counter()
    unowned: ClassVar[list[torch.Tensor]] = []

    def __init__(
        self, runnable: Any, vllm_config: VllmConfig, runtime_mode: Any, cudagraph_options: Any
    ) -> None:
        self.runnable, self.mode, self.options = runnable, runtime_mode, cudagraph_options
        self.captured: dict[BatchDescriptor, tuple[list[int], Any]] = {}
        self.counts["pieces"] += 1

    def __call__(self, *args: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.mode:
            self.counts["without"] += 1
            return self.runnable(*args)
        while self.unowned:
            self.unowned.pop().fill_(float("nan"))
        addresses = [tensor.data_ptr() for tensor in _tensors(args)]
        outputs = self.runnable(*args)
        assert context.batch_descriptor is not None
        if context.batch_descriptor not in self.captured:
            self.counts["captures"] += 1
            self.captured[context.batch_descriptor] = (addresses, outputs)
            return outputs

        self.counts["replays"] += 1
        captured_addresses, captured = self.captured[context.batch_descriptor]
        assert addresses == captured_addresses, "inputs are not where they were at capture"
        for new, old in zip(_tensors(outputs), _tensors(captured), strict=True):
            if new.data_ptr() != old.data_ptr():
                old.copy_(new)
        if self.options.weak_ref_output:
            self.unowned.extend(_tensors(captured))
        return captured


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def compile_as_on_a_gpu(capture_sizes: list[int]) -> None:
    """Make this process, for good, keep what was asked for and add what a GPU's platform adds."""
    platform = type(current_platform)
    apply = platform.check_and_update_config

    def check_and_update_config(vllm_config: VllmConfig) -> None:
        config = vllm_config.compilation_config
        asked = {
            "mode": config.mode,
            "ir_enable_torch_wrap": config.ir_enable_torch_wrap,
            "inductor_compile_config": dict(config.inductor_compile_config),
        }
        apply(vllm_config)
        for name, value in asked.items():
            setattr(config, name, value)
        config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        config.cudagraph_capture_sizes = sorted(capture_sizes)
        config.max_cudagraph_capture_size = max(capture_sizes)

    platform.check_and_update_config = staticmethod(check_and_update_config)
    platform.get_static_graph_wrapper_cls = classmethod(lambda cls: f"{__name__}.PieceGraphs")
    # This pass names operators that only builds for a GPU have.
    pass_manager.FixFunctionalizationPass.__call__ = lambda self, graph: None
    CPUAttentionBackendImpl.forward = attend
    torch.accelerator.empty_cache = lambda: None
    # vLLM starts a process to look at a class that it has not seen: half of a warm run's time.
    registry._run_in_subprocess = lambda inspect: inspect()


def attend(
    self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any,
    output: torch.Tensor, *args: Any, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of one request whose prompt is the batch."""
    heads = (tensor.transpose(0, 1) for tensor in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    return output.copy_(attended.transpose(0, 1).reshape(output.shape))


def build(request: dict[str, Any]) -> tuple[VllmConfig, Any]:
    """What a worker has before it runs: its settings, its rank and the loaded model."""
    vllm_config = EngineArgs(
        model=request["checkpoint"],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=MAX_NUM_TOKENS,
        max_num_seqs=4,
        max_num_batched_tokens=MAX_NUM_TOKENS,
        compilation_config={
            "mode": CompilationMode.VLLM_COMPILE,
            **request["compilation_config"],
        },
        speculative_config={
            "method": "layerskip",
            "exit_layer": 2,
            "num_speculative_tokens": 3,
        },
    ).create_engine_config()
    vllm_config.compilation_config.post_init_cudagraph_sizes()
    vllm_config.kernel_config.ir_op_priority.set_default()
    vllm.ir.set_default_torch_wrap(vllm_config.compilation_config.ir_enable_torch_wrap)
    with set_current_vllm_config(vllm_config):
        ranks = Path(request["folder"]) / f"ranks-{os.getpid()}"
        parallel_state.init_distributed_environment(1, 0, f"file://{ranks}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        return vllm_config, get_model(vllm_config=vllm_config)


class Runner:
    """Calls the model on a runner's persistent inputs."""

    def __init__(self, vllm_config: VllmConfig, model: Any) -> None:
        self.vllm_config, self.model = vllm_config, model
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.input_ids = torch.zeros(MAX_NUM_TOKENS, dtype=torch.int32)
        self.positions = torch.arange(MAX_NUM_TOKENS)
        self.next_tokens()

    def next_tokens(self) -> None:
        self.input_ids.random_(self.vocab_size)

    @contextmanager
    def context(self, num_tokens: int, mode: CUDAGraphMode, **kwargs: Any) -> Iterator[None]:
        graphs = mode != CUDAGraphMode.NONE
        with set_forward_context(
            None,
            self.vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=mode,
            batch_descriptor=BatchDescriptor(num_tokens) if graphs else None,
            **kwargs,
        ):
            yield

    def forward(
        self, num_tokens: int, mode: CUDAGraphMode = CUDAGraphMode.NONE, **kwargs: Any
    ) -> torch.Tensor:
        with self.context(num_tokens, mode, **kwargs):
            output = self.model(self.input_ids[:num_tokens], self.positions[:num_tokens])
        return output.clone()  # The next graph takes this one's memory.

    def draft(self, **kwargs: Any) -> torch.Tensor:
        with self.context(1, CUDAGraphMode.NONE, **kwargs):
            exit_state = self.model.run_early_stage(self.input_ids[:1], self.positions[:1])
        return torch.stack(exit_state)


def compare(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest value; NaN if there is a NaN."""
    return ((tensor - expected).abs().max() / expected.abs().max()).item()


def outputs(runner: Runner, request: dict[str, Any]) -> dict[str, Any]:
    """How far compiled, captured and replayed outputs are from the expected ones."""
    facts: dict[str, Any] = {"eager": {}, "piecewise": {}}
    runner.forward(MAX_NUM_TOKENS)  # The profile run compiles, for the largest batch.
    for num_tokens in request["eager_sizes"]:
        eager = runner.forward(num_tokens, skip_compiled=True)
        facts["eager"][num_tokens] = compare(runner.forward(num_tokens), eager)
    # The capture, and replays of other tokens; sizes take turns.
    for _ in range(1 + request["num_replays"]):
        runner.next_tokens()
        for num_tokens in request["capture_sizes"]:
            replayed = runner.forward(num_tokens, CUDAGraphMode.PIECEWISE)
            facts["piecewise"].setdefault(num_tokens, []).append(
                compare(replayed, runner.forward(num_tokens))
            )
    eager = runner.draft(skip_compiled=True)
    facts["graphs"] = dict(PieceGraphs.counts)
    facts["draft"] = compare(runner.draft(), eager)
    facts["graphs after a draft"] = dict(PieceGraphs.counts)
    return facts


def outputs_without_late_stage_inputs(runner: Runner) -> dict[str, Any]:
    """A model that hands the early stage's outputs to the late stage as they are."""
    stages = runner.model._stages
    kept: list[Any] = []  # Otherwise the next copy might take this memory.

    def hand_over(num_tokens: int, copied: bool) -> float | str:
        def early_stage(*args: Any) -> Any:
            exit_state = stages[0](*args)
            kept.append([part.clone() for part in exit_state] if copied else exit_state)
            return exit_state

        def late_stage(positions: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return stages[1](positions, *kept[-1])

        expected = runner.forward(num_tokens)
        with mock.patch.object(runner.model, "_stages", (early_stage, late_stage)):
            runner.forward(num_tokens, CUDAGraphMode.PIECEWISE)
            try:
                output = runner.forward(num_tokens, CUDAGraphMode.PIECEWISE)
            except AssertionError as error:
                return str(error)
        return compare(output, expected)

    # Sizes without a graph so far, so that the capture happens in this way, too.
    return {"own memory": hand_over(3, copied=False), "a copy": hand_over(5, copied=True)}


def let_go(model_ref: weakref.ref) -> dict[str, Any]:
    """What vLLM does when an engine is deleted, first without the stages in ``modules()``."""
    with mock.patch.object(LayerSkipForCausalLM, "modules", torch.nn.Module.modules):
        without_stages = clean_up(model_ref)
    return {"without stages": without_stages, "with stages": clean_up(model_ref)}


def clean_up(model_ref: weakref.ref) -> dict[str, Any]:
    LLMEngine._cleanup_instance_caches(model_ref)
    gc.collect()
    return {"hooks": num_bytecode_hooks(), "freed": model_ref() is None}


def num_bytecode_hooks() -> int:
    return len(convert_frame._bytecode_hooks)


@torch.inference_mode()
def main() -> None:
    request = json.loads(sys.argv[1])
    torch.manual_seed(0)
    compile_as_on_a_gpu(request["capture_sizes"])
    facts: dict[str, Any] = {"hooks before": num_bytecode_hooks()}
    vllm_config, model = build(request)
    facts["hooks"] = num_bytecode_hooks()
    facts["mode"] = vllm_config.compilation_config.mode.name

    runner = Runner(vllm_config, model)
    facts["outputs"] = outputs(runner, request)
    facts["counter"] = asdict(compilation_counter)
    facts["loaded"] = {
        stage._compile_tag: stage.was_aot_compile_fn_loaded_from_disk for stage in model._stages
    }
    facts["bypassed"] = outputs_without_late_stage_inputs(runner)

    model_ref = weakref.ref(model)
    del model, runner, vllm_config
    facts["let go"] = let_go(model_ref)
    print("RESULT " + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
