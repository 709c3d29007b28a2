# SPDX-License-Identifier: Apache-2.0
"""The formula of docs/capacity.md: what an engine does with requests of one kind, on paper."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.engines.presets import length_for
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.hardware import Gpu
from vllm_layerskip.measuring.roofline import NUM_BYTES, Decoding, Roofline
from vllm_layerskip.measuring.shapes import Shape


@dataclass(frozen=True)
class Assumptions:
    """What a roofline does not say. The defaults are assumed, not measured."""

    decode_efficiency: float = 0.7
    """Share of the roofline that decoding reaches, with and without drafts."""
    prefill_efficiency: float = 0.5
    all_reduce_s: float = 10e-6
    """What an all-reduce costs besides its bytes."""
    memory_share: float = 0.9
    """vLLM's ``gpu_memory_utilization``; activations and graphs live in the rest."""
    headroom: float = 0.25
    """Capacity above the mean load, for peaks and for GPUs that fail."""
    max_num_seqs: int = 256


@dataclass(frozen=True)
class Engine:
    """One copy of a model on ``tp`` GPUs."""

    shape: Shape
    gpu: Gpu
    tp: int = 1
    dtype: str = "bfloat16"
    assumptions: Assumptions = Assumptions()

    def __post_init__(self) -> None:
        if self.shape.num_kv_heads % self.tp:
            raise UserError(
                f"--tp {self.tp} must divide the {self.shape.num_kv_heads} K/V heads. Use "
                f"{', '.join(str(n) for n in (1, 2, 4, 8) if self.shape.num_kv_heads % n == 0)}."
            )
        if self.tp > 1 and not self.gpu.link:
            raise UserError(
                f"--tp {self.tp}: no link between these GPUs is known. Use --tp 1, or a GPU with "
                "NVLink."
            )

    @property
    def _together(self) -> Roofline:
        """The GPUs as one GPU: each holds and reads its share."""
        gpu = Gpu(self.gpu.bandwidth * self.tp, self.gpu.flops * self.tp)
        return Roofline(self.shape, gpu, self.dtype)

    def all_reduces_s(self, num_layers: int, num_tokens: float) -> float:
        """Seconds of the all-reduces: two a layer, of all hidden states, round a ring."""
        if self.tp == 1:
            return 0.0
        size = num_tokens * self.shape.hidden_size * NUM_BYTES[self.dtype]
        one = self.assumptions.all_reduce_s + 2 * (self.tp - 1) / self.tp * size / self.gpu.link
        return 2 * num_layers * one

    def step_s(self, decoding: Decoding, batch_size: int, context: float) -> float:
        """Seconds of a decoding step."""
        num_layers, exit_layer = self.shape.num_layers, decoding.exit_layer
        num_drafts = decoding.num_speculative_tokens
        if num_drafts == 0:
            reduces = self.all_reduces_s(num_layers, batch_size)
        else:
            num_passes = num_drafts + 1
            reduces = num_passes * self.all_reduces_s(exit_layer, batch_size)
            reduces += self.all_reduces_s(num_layers - exit_layer, batch_size * num_passes)
        bound = self._together.step_s(decoding, batch_size, context)
        return bound / self.assumptions.decode_efficiency + reduces

    def prefill_s(self, prompt_len: int) -> float:
        """Seconds of one prompt: its FLOPs, attention included."""
        shape = self.shape
        weights = shape.num_layers * shape.layer_weights
        attention = 2 * prompt_len * shape.num_layers * shape.num_heads * shape.head_dim
        flops = prompt_len * (2 * weights + attention)
        compute = flops / (self.gpu.flops * self.tp) / self.assumptions.prefill_efficiency
        return compute + self.all_reduces_s(shape.num_layers, prompt_len)

    def max_batch(self, num_tokens: int, num_drafts: int) -> int:
        """Requests of ``num_tokens`` each whose K/V fit beside weights and exit states; maybe 0."""
        shape, width = self.shape, NUM_BYTES[self.dtype]
        room = self.tp * self.gpu.memory * self.assumptions.memory_share
        room -= shape.num_weights * width
        kv = (num_tokens + num_drafts) * shape.num_layers * shape.kv_values_per_layer * width
        # Hidden states and residual, on every rank.
        exit_states = self.tp * num_drafts * 2 * shape.hidden_size * width
        return max(0, min(self.assumptions.max_num_seqs, math.floor(room / (kv + exit_states))))


@dataclass(frozen=True)
class RequestKind:
    """Requests that are all alike."""

    prompt_len: int
    output_len: int
    max_tpot_s: float = math.inf
    """Seconds that a token of one request may take."""

    @property
    def context(self) -> float:
        """Mean tokens in the cache of a decoding request."""
        return self.prompt_len + self.output_len / 2


@dataclass(frozen=True)
class EnginePlan:
    """What one engine does with requests of one kind."""

    num_speculative_tokens: int
    batch_size: int
    tokens_per_s: float
    """Output tokens, prefill's time included."""
    tpot_s: float
    """Seconds between tokens of one request, without prefill of others."""

    def num_engines(self, tokens_per_s: float, headroom: float) -> int:
        return math.ceil(tokens_per_s * (1 + headroom) / self.tokens_per_s)


def plan_engine(engine: Engine, kind: RequestKind, decoding: Decoding) -> EnginePlan | None:
    """The engine with the largest batch that fits and keeps the time a token; None if none does."""
    num_drafts = decoding.num_speculative_tokens
    largest = engine.max_batch(kind.prompt_len + kind.output_len, num_drafts)

    def tpot_s(batch_size: int) -> float:
        return engine.step_s(decoding, batch_size, kind.context) / decoding.acceptance_length

    # The time grows with the batch.
    low, high = 0, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tpot_s(middle) <= kind.max_tpot_s else (low, middle - 1)
    if low == 0:
        return None
    seconds = low * engine.prefill_s(kind.prompt_len) + kind.output_len * tpot_s(low)
    return EnginePlan(num_drafts, low, low * kind.output_len / seconds, tpot_s(low))


def layerskip(exit_layer: int, num_drafts: int, length: float, other: int) -> Decoding:
    """LayerSkip with ``other`` drafts, where ``num_drafts`` have the acceptance ``length``."""
    if other == 0:
        return Decoding("plain")
    return Decoding("layerskip", exit_layer, other, length_for(length, num_drafts, other))


def best_engine_plan(
    engine: Engine, kind: RequestKind, decodings: Iterable[Decoding]
) -> EnginePlan | None:
    """The plan with the most tokens a second, as a tuned schedule would choose."""
    plans = [p for decoding in decodings if (p := plan_engine(engine, kind, decoding)) is not None]
    return max(plans, key=lambda p: p.tokens_per_s, default=None)


def gpu_hours_per_million(engine: Engine, plan: EnginePlan) -> float:
    """GPU hours for a million output tokens, at full use."""
    return engine.tp * 1e6 / plan.tokens_per_s / 3600


def layerskip_up_to(exit_layer: int, length: float, num_drafts: int = 4) -> list[Decoding]:
    """Every K from 0 to ``num_drafts``, which has the acceptance ``length``."""
    return [layerskip(exit_layer, num_drafts, length, k) for k in range(num_drafts + 1)]
