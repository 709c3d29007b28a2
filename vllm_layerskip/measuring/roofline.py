# SPDX-License-Identifier: Apache-2.0
"""The fastest that a decoding step can be: what it must move and compute, over the GPU's peaks.

A stage of n layers over T tokens of B requests, with c tokens a request in the KV cache, w bytes a
weight and v bytes a value of K/V, takes at least

    max( ((n * layer + head) * w + B * c * n * kv * v) / bandwidth,
         (2 * T * (n * layer + head) + 4 * T * c * n * heads * head_dim) / flops )

where layer, head and kv are the values of one layer's matrices, of the LM head (if the stage
ends in it) and of one token's keys and values in one layer. A step is the sum of its stages:

    plain, early exit   all layers, T = B
    layerskip           K drafts of E layers, T = B; verify: E layers with T = B (reuse) or
                        B * (K + 1) (no reuse), L - E layers with T = B * (K + 1)
    draft-model         K drafts of E layers, T = B; verify: L layers with T = B * (K + 1)
    layerskip, twin     K drafts of E layers and head in the twin's weights, T = B; verify: L layers
                        with T = B * (K + 1), since exit states are not reused
    ngram               verify alone

and yields *acceptance length* tokens a request. Activations, norms, sampling, the embedding's
few rows and KV writes are left out, so it is a bound. At batch 1 the bytes decide, and the bound
of LayerSkip's speed-up is that of docs/design.md: A * full / (K * (early + head) + full), or
A / (1 + K * c) with c = draft bytes / full bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_layerskip.measuring.hardware import Gpu
from vllm_layerskip.measuring.shapes import Shape
from vllm_layerskip.twins.kinds import FP8, GROUP_SIZES, INT4, INT8, KINDS, NONE

BYTES_ONLY = Gpu(bandwidth=1.0, flops=math.inf)
"""For ratios by bytes alone, where the GPU is unknown."""

NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_SCALE_BITS, _ZERO_POINT_BITS = 16, 4
"""Of each group of int4 weights."""

_PEAK_OVER_BFLOAT16 = {INT8: 2.0, FP8: 2.0}
"""Matrix units multiply 8-bit values twice as fast; int4 weights become bfloat16 first."""


def twin_bytes(kind: str) -> float:
    """Bytes a weight of a draft twin; one scale for each output (int8, fp8) is left out."""
    bits: float = KINDS[kind].bits
    if kind == INT4:
        bits += (_SCALE_BITS + _ZERO_POINT_BITS) / GROUP_SIZES[0]
    return bits / 8


@dataclass(frozen=True)
class Decoding:
    """How one mode decodes, as far as the cost of its step depends on it."""

    mode: str
    exit_layer: int = 0
    num_speculative_tokens: int = 0
    acceptance_length: float = 1.0
    draft_vocab: int | None = None
    draft_quantization: str = NONE
    """The kind of a draft twin."""

    @property
    def reuses_exit_states(self) -> bool:
        return self.mode == "layerskip" and self.draft_quantization == NONE

    @property
    def drafts_with_layers(self) -> bool:
        return self.mode.startswith("layerskip") or self.mode == "draft-model"


@dataclass(frozen=True)
class Roofline:
    """Bounds for one shape on one GPU."""

    shape: Shape
    gpu: Gpu
    dtype: str = "bfloat16"

    def stage_s(
        self,
        num_layers: int,
        head_weights: int,
        num_tokens: int,
        batch_size: int,
        context: float,
        twin: str = NONE,
    ) -> float:
        """Seconds of one pass through ``num_layers`` layers, and through a head if it has one.

        Args:
            twin: kind of the weights; ``none`` for the target's own.
        """
        shape, width = self.shape, NUM_BYTES[self.dtype]
        # In float32 a twin is a reference: rounded weights, kept at full width.
        is_full_width = twin == NONE or self.dtype == "float32"
        weight_width = width if is_full_width else twin_bytes(twin)
        peak = _PEAK_OVER_BFLOAT16.get(twin, 1.0)
        weights = num_layers * shape.layer_weights + head_weights
        kv_values = batch_size * context * num_layers * shape.kv_values_per_layer
        attention = 4 * context * num_layers * shape.num_heads * shape.head_dim
        return max(
            (weights * weight_width + kv_values * width) / self.gpu.bandwidth,
            num_tokens * (2 * weights + attention) / (self.gpu.flops * peak),
        )

    def step_s(self, decoding: Decoding, batch_size: int, context: float) -> float:
        """Seconds of one decoding step of ``batch_size`` requests."""
        shape, batch = self.shape, (batch_size, context)
        if decoding.mode == "early-exit":
            return self.stage_s(decoding.exit_layer, shape.head_weights, batch_size, *batch)
        num_drafts, exit_layer = decoding.num_speculative_tokens, decoding.exit_layer
        num_verified = batch_size * (num_drafts + 1)
        if not decoding.drafts_with_layers or num_drafts == 0:
            return self.stage_s(shape.num_layers, shape.head_weights, num_verified, *batch)
        draft_vocab = decoding.draft_vocab or shape.vocab_size
        draft_head = shape.hidden_size * draft_vocab
        draft_s = num_drafts * self.stage_s(
            exit_layer, draft_head, batch_size, *batch, twin=decoding.draft_quantization
        )
        num_early = batch_size if decoding.reuses_exit_states else num_verified
        early_s = self.stage_s(exit_layer, 0, num_early, *batch)
        num_late_layers = shape.num_layers - exit_layer
        return (
            draft_s
            + early_s
            + self.stage_s(num_late_layers, shape.head_weights, num_verified, *batch)
        )

    def tokens_per_s(self, decoding: Decoding, batch_size: int, context: float) -> float:
        """The bound of all requests' tokens a second."""
        step_s = self.step_s(decoding, batch_size, context)
        return batch_size * decoding.acceptance_length / step_s

    def speedup(self, decoding: Decoding, batch_size: int, context: float) -> float:
        """The bound of the speed-up over plain decoding at its own bound."""
        plain_s = self.step_s(Decoding("plain"), batch_size, context)
        return decoding.acceptance_length * plain_s / self.step_s(decoding, batch_size, context)


def scheduled_drafts(
    schedule: Sequence[Sequence[int]] | None, num_speculative_tokens: int, batch_size: int
) -> int:
    """K at ``batch_size`` under vLLM's ``num_speculative_tokens_per_batch_size``.

    Args:
        schedule: ``(first batch size, last batch size, K)`` each; None for K at every batch size.
    """
    if schedule is None:
        return num_speculative_tokens
    # Between and after its ranges vLLM carries the last K forward.
    started = [entry for entry in sorted(schedule, key=lambda e: e[0]) if entry[0] <= batch_size]
    return min(num_speculative_tokens, started[-1][2])
