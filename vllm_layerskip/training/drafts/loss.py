# SPDX-License-Identifier: Apache-2.0
"""The loss of a draft adapter: its predictions against those of the frozen model's last layer.

Two passes share a batch. The target's runs all layers without adapters and without gradients; what
is kept of it are its last hidden states and the K/V of layers 0..E-1. The drafts' runs layers
0..E-1 with adapters. Logits of both exist for a chunk of tokens at a time, and are computed again
in the backward pass. Labels only say which positions count.

Shapes: B samples, T tokens, N positions that count, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_layerskip.evaluation.exits import around_layers, exit_logits
from vllm_layerskip.training.drafts.attention import TargetKV
from vllm_layerskip.training.drafts.recipe import Distill
from vllm_layerskip.training.loss import (
    CHUNK_TOKENS,
    counted_positions,
    replaced_loss,
    shifted_labels,
)

Comparison = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""KL divergence and cross entropy, summed, and ``[N]`` whether both have the same argmax."""


def compare(
    model: nn.Module,
    draft_states: torch.Tensor,  # [B * T, H], of layer E - 1
    target_states: torch.Tensor,  # [B * T, H], normed
    positions: torch.Tensor,  # [N]
    chunk_tokens: int = CHUNK_TOKENS,
) -> Comparison:
    """Compare what drafts and target predict."""

    def compare_chunk(drafts: torch.Tensor, chunk: torch.Tensor) -> Comparison:
        with torch.no_grad(), _norm_left_out(model.model):  # type: ignore[arg-type]
            target = exit_logits(model, target_states[chunk]).float().log_softmax(-1)
        draft = exit_logits(model, drafts[chunk]).float().log_softmax(-1)
        said = target.argmax(-1)
        return (
            F.kl_div(draft, target, reduction="sum", log_target=True),
            F.nll_loss(draft, said, reduction="sum"),
            draft.argmax(-1) == said,
        )

    kl, cross_entropy = torch.zeros((2,), device=draft_states.device)
    matches = []
    for chunk in positions.split(chunk_tokens):
        found = checkpoint(
            compare_chunk, draft_states, chunk, use_reentrant=False, preserve_rng_state=False
        )
        kl, cross_entropy = kl + found[0], cross_entropy + found[1]
        matches.append(found[2])
    return kl, cross_entropy, torch.cat(matches)


@contextmanager
def _norm_left_out(decoder: nn.Module) -> Iterator[None]:
    """Target states are normed already, and by a norm that no adapter has changed."""
    norm = decoder.norm
    decoder.norm = nn.Identity()
    try:
        yield
    finally:
        decoder.norm = norm


class TargetPass:
    """What the frozen model says about a batch."""

    def __init__(self, peft_model: nn.Module, exit_layer: int) -> None:
        """Takes a model with adapters; E layers draft."""
        self._peft_model = peft_model
        self.causal_lm: nn.Module = peft_model.get_base_model()  # type: ignore[operator]
        self.kv = TargetKV(self.causal_lm.model.layers[:exit_layer])  # type: ignore[index,union-attr]
        self.states = torch.empty(0)

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Run all layers.

        Args:
            model: the model as the trainer calls it, which may be a distributed wrapper.
        """
        decoder = self.causal_lm.model
        states: list[torch.Tensor] = []
        hook = decoder.norm.register_forward_hook(  # type: ignore[union-attr,operator]
            lambda _module, _args, output: states.append(output.detach())
        )
        was_training = model.training
        try:
            model.eval()  # The target has no dropout.
            with torch.no_grad(), self._peft_model.disable_adapter(), self.kv.recorded():  # type: ignore[operator]
                model(**{name: value for name, value in inputs.items() if name != "labels"})
        finally:
            model.train(was_training)
            hook.remove()
        self.states = states[0].flatten(0, 1)


class DraftMeter:
    """KL divergence, cross entropy and agreement, summed since ``read`` was last called."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, comparison: Comparison) -> None:
        kl, cross_entropy, matches = comparison
        self.totals[0] += kl.detach()
        self.totals[1] += cross_entropy.detach()
        self.totals[2] += matches.sum()
        self.totals[3] += len(matches)

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Means over tokens; starts again from zero.

        Args:
            reduce: sums a tensor over all ranks.
        """
        *totals, num_tokens = reduce(self.totals).tolist()
        self.totals = torch.zeros_like(self.totals)
        names = ("kl", "argmax_loss", "agreement")
        if not num_tokens:
            return {}
        return {name: total / num_tokens for name, total in zip(names, totals, strict=True)}


class DraftLoss:
    """Runs one pass of layers 0..E-1 with the loss against the target.

    It stands in for the model's ``loss_function``, as ``ExitLoss`` does and for its reasons.
    """

    def __init__(
        self, target: TargetPass, exit_layer: int, distill: Distill, meter: DraftMeter | None = None
    ) -> None:
        self.target = target
        self.exit_layer = exit_layer
        self.distill = distill
        self.meter = meter
        self.matches = torch.empty(0)
        """``[B, T]`` after the pass: which positions count and have the target's argmax."""
        self._state: torch.Tensor | None = None

    @contextmanager
    def applied(self, num_speculative_tokens: int, offset: int) -> Iterator[None]:
        """Within this block the model's forward is that of drafts; see ``TargetKV.attend``."""
        model = self.target.causal_lm
        self.target.kv.attend(num_speculative_tokens, offset)
        try:
            with replaced_loss(model, self._loss), around_layers(model, self._around):
                yield
        finally:
            self._state = None

    def _around(
        self,
        layer: int,
        call: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        if layer >= self.exit_layer:
            return hidden_states
        output = call(hidden_states, **kwargs)
        if layer == self.exit_layer - 1:
            self._state = output
        return output

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss, called as transformers calls a model's ``loss_function``."""
        assert self._state is not None
        positions = counted_positions(shifted_labels(labels, kwargs)).to(self._state.device)
        found = compare(
            self.target.causal_lm, self._state.flatten(0, 1), self.target.states, positions
        )
        kl, cross_entropy, matches = found
        if self.meter is not None:
            self.meter.add(found)
        self.matches = torch.zeros(labels.numel(), dtype=torch.bool, device=matches.device)
        self.matches[positions] = matches
        self.matches = self.matches.view(labels.shape)
        total = {"kl": kl, "argmax": cross_entropy, "both": kl + cross_entropy}[self.distill]
        if num_items_in_batch is None:
            return total / max(len(positions), 1)
        return total / num_items_in_batch
