# SPDX-License-Identifier: Apache-2.0
"""Engines whose drafts have weights of their own, and what holds for each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engines import Engine, EnginePool, SpecCounts

from vllm_layerskip.twins.rounding import round_trip
from vllm_layerskip.worker import twin_linear
from vllm_layerskip.worker.draft_twin import DraftTwin
from vllm_layerskip.worker.twin_linear import TwinLinear
from vllm_layerskip.worker.twin_methods import FullWidth


def twin_engine(
    pool: EnginePool,
    model: Path,
    exit_layer: int | str,
    num_speculative_tokens: int,
    kind: str = "int4",
    spec: dict[str, Any] | None = None,
    **settings: Any,
) -> Engine:
    spec = {"draft_quantization": kind, **(spec or {})}
    return pool.layerskip(model, exit_layer, num_speculative_tokens, spec=spec, **settings)


def twin_of(engine: Engine) -> DraftTwin:
    twin = engine.runner.model.draft_twin
    assert twin is not None
    return twin


def linears_of(engine: Engine) -> list[TwinLinear]:
    """The twin's linear layers, its LM head last."""
    twin = twin_of(engine)
    return [*twin.linears, *filter(None, [twin.head])]


@contextlib.contextmanager
def speculating(engine: Engine) -> Iterator[SpecCounts]:
    """What the block drafts; some drafts must be accepted, and no exit state reused."""
    assert engine.runner.model.draft_state.exit_states.num_bytes == 0
    with engine.counting() as counts:
        yield counts
    counts.assert_speculated()
    assert counts.num_verify_steps_reused == 0


@contextlib.contextmanager
def twins_without_rounding() -> Iterator[None]:
    """Engines that start in this block have twins with the target's own weights."""
    original = twin_linear.twin_method
    twin_linear.twin_method = lambda kind, *sizes: FullWidth(*sizes)
    try:
        yield
    finally:
        twin_linear.twin_method = original


def spoil(engine: Engine) -> None:
    """Give the twin's layers random weights, as large as the ones that they had."""
    generator = torch.Generator().manual_seed(0)
    for linear in twin_of(engine).linears:
        weight = outputs(linear).t()
        noise = torch.randn(weight.shape, generator=generator) * weight.float().std().cpu()
        bias = linear.module._parameters.get("bias")
        linear.method.make_weights(linear.module, noise.to(weight), bias)


@torch.inference_mode()
def outputs(linear: TwinLinear) -> torch.Tensor:
    """``[M, N]``: what a twin's linear layer makes of each input alone, wherever its weight is."""
    device = linear.target.weight.device
    inputs = torch.eye(linear.shape[1], dtype=linear.method.dtype, device=device)
    return linear.method.apply(linear.module, inputs)


@torch.inference_mode()
def target_weight(linear: TwinLinear) -> torch.Tensor:
    """``[N, M]``: the weight of the target's layer, also where vLLM has packed it (float32)."""
    if linear.has_source:
        return linear.target.weight
    inputs = torch.eye(linear.shape[1], dtype=linear.method.dtype)
    return linear.target.quant_method.apply(linear.target, inputs).t()


def rounding_error(linear: TwinLinear, kind: str) -> float:
    """How far a reference twin's layer is from the target's weight, rounded to ``kind``."""
    weight = target_weight(linear)
    assert not torch.equal(weight, round_trip(weight, kind))
    return float((outputs(linear).t() - round_trip(weight, kind)).abs().max())
