# SPDX-License-Identifier: Apache-2.0
"""The loss of a draft adapter: its predictions against those of the frozen model's last layer.

Two passes share a batch. The target's runs all layers without adapters and without gradients; what
is kept of it are its last hidden states and the K/V of layers 0..E-1. The drafts' runs layers
0..E-1 with adapters. Labels only say which positions count.

The LM head is frozen, so the loss of a chunk of tokens and its gradient for the normed exit states
are computed together, in the forward pass: logits of both exist for that chunk alone, and none is
computed twice.

Shapes: B samples, T tokens, N positions that count, V vocabulary (or D of a draft vocabulary),
H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vllm_layerskip.evaluation.exits import around_layers, exit_logits
from vllm_layerskip.training.drafts.attention import TargetKV
from vllm_layerskip.training.drafts.memory import Said, TargetMemory
from vllm_layerskip.training.drafts.recipe import Distill
from vllm_layerskip.training.drafts.rows import HeadRows
from vllm_layerskip.training.loss import (
    CHUNK_TOKENS,
    IGNORED,
    counted_positions,
    replaced_loss,
    shifted_labels,
)


class Comparison(NamedTuple):
    """Summed over positions; of these, ``loss`` alone has a gradient."""

    loss: torch.Tensor
    kl: torch.Tensor
    """KL divergence of the drafts' distribution from the target's."""
    cross_entropy: torch.Tensor
    """Of the target's argmax."""
    matches: torch.Tensor
    """``[N]``: whether both have the same argmax."""


def compare(
    model: nn.Module,
    draft_states: torch.Tensor,  # [B * T, H], of layer E - 1
    target_states: torch.Tensor,  # [B * T, H], normed
    positions: torch.Tensor,  # [N]
    distill: Distill,
    rows: HeadRows | None = None,
    tokens: torch.Tensor | None = None,  # [B * T], the target's argmax; needed with rows
    chunk_tokens: int = CHUNK_TOKENS,
) -> Comparison:
    """Compare what drafts and target predict.

    Args:
        rows: the only tokens that drafts may be. Both distributions are taken among them; where
            the target says another token, no draft is right, and there is no argmax to learn.
    """

    def compare_chunk(drafts: torch.Tensor, chunk: torch.Tensor) -> Comparison:
        with _norm_left_out(model.model), rows.picked() if rows else nullcontext():  # type: ignore[arg-type]
            with torch.no_grad():
                target = exit_logits(model, target_states[chunk]).float().log_softmax(-1)
            draft = exit_logits(model, drafts).float().log_softmax(-1)
        said = target.argmax(-1)
        if rows is not None:
            assert tokens is not None
            said = rows.places(tokens[chunk])
        kl = F.kl_div(draft, target, reduction="sum", log_target=True)
        cross_entropy = F.nll_loss(draft, said, reduction="sum", ignore_index=-1)
        loss = {"kl": kl, "argmax": cross_entropy, "both": kl + cross_entropy}[distill]
        return Comparison(loss, kl.detach(), cross_entropy.detach(), draft.argmax(-1) == said)

    normed = model.model.norm(draft_states[positions])  # type: ignore[union-attr,operator]
    return Comparison(*_InChunks.apply(normed, compare_chunk, positions.split(chunk_tokens)))


class _InChunks(torch.autograd.Function):
    """A sum over chunks whose gradient is computed along with it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        normed: torch.Tensor,  # [N, H]
        compare_chunk: Callable[[torch.Tensor, torch.Tensor], Comparison],
        chunks: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        needs_gradient = ctx.needs_input_grad[0]
        found, gradients = [], []
        for own, chunk in zip(normed.split([len(c) for c in chunks]), chunks, strict=True):
            with torch.set_grad_enabled(needs_gradient):
                leaf = own.detach().requires_grad_(needs_gradient)
                compared = compare_chunk(leaf, chunk)
            if needs_gradient:
                gradients += torch.autograd.grad(compared.loss, leaf)
            found.append(compared)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        sums = [torch.stack([c[i].detach() for c in found]).sum() for i in range(3)]
        matches = torch.cat([c.matches for c in found])
        ctx.mark_non_differentiable(sums[1], sums[2], matches)
        return (*sums, matches)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_others: Any) -> Any:  # type: ignore[override]
        (own,) = ctx.saved_tensors
        return (gradient * own).to(own.dtype), None, None


@contextmanager
def _norm_left_out(decoder: nn.Module) -> Iterator[None]:
    """States are normed already: the target's by a norm that no adapter has changed."""
    norm = decoder.norm
    decoder.norm = nn.Identity()
    try:
        yield
    finally:
        decoder.norm = norm


class TargetPass:
    """What the frozen model says about a batch."""

    def __init__(
        self,
        peft_model: nn.Module,
        exit_layer: int,
        rows: HeadRows | None = None,
        memory: TargetMemory | None = None,
    ) -> None:
        """Takes a model with adapters; E layers draft.

        Args:
            rows: the tokens that drafts may be; then the target's argmax is found, too.
            memory: keeps what was said; a batch that it knows runs layers 0..E-1 alone.
        """
        self._peft_model = peft_model
        self.causal_lm: nn.Module = peft_model.get_base_model()  # type: ignore[operator]
        self._exit_layer = exit_layer
        self.kv = TargetKV(self.causal_lm.model.layers[:exit_layer])  # type: ignore[index,union-attr]
        self.rows = rows
        self._memory = memory
        self.states = torch.empty(0)
        """``[B * T, H]``, normed."""
        self.tokens: torch.Tensor | None = None
        """``[B * T]``, the argmax; only with ``rows``."""

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Run all layers, or of a batch that is remembered those that draft.

        Args:
            model: the model as the trainer calls it, which may be a distributed wrapper.
        """
        said = None if self._memory is None else self._memory.recall(inputs)
        was_training = model.training
        try:
            model.eval()  # The target has no dropout.
            with torch.no_grad(), self._peft_model.disable_adapter():  # type: ignore[operator]
                if said is None:
                    said = self._all_layers(model, inputs)
                else:
                    with around_layers(self.causal_lm, self._early_only):
                        self._forward(model, inputs)
        finally:
            model.train(was_training)
        self.states = said.states.flatten(0, 1)
        self.tokens = said.tokens.flatten() if self.rows else None

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        with self.kv.recorded():
            model(**{name: value for name, value in inputs.items() if name != "labels"})

    def _early_only(
        self, layer: int, call: Callable[..., torch.Tensor], state: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return call(state, **kwargs) if layer < self._exit_layer else state

    def _all_layers(self, model: nn.Module, inputs: Mapping[str, Any]) -> Said:
        states: list[torch.Tensor] = []
        hook = self.causal_lm.model.norm.register_forward_hook(  # type: ignore[union-attr,operator]
            lambda _module, _args, output: states.append(output.detach())
        )
        try:
            self._forward(model, inputs)
        finally:
            hook.remove()
        said = Said(states[0], self._argmax(states[0], inputs))
        if self._memory is not None:
            self._memory.keep(inputs, said)
        return said

    def _argmax(self, states: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """``[B, T]``, with ``IGNORED`` where it is not needed: at positions that do not count."""
        tokens = torch.full(states.shape[:2], IGNORED, device=states.device)
        if self.rows is None:
            return tokens
        labels = shifted_labels(inputs["labels"], inputs).to(states.device)
        flat_states, flat_tokens = states.flatten(0, 1), tokens.flatten()
        with _norm_left_out(self.causal_lm.model):  # type: ignore[arg-type]
            for chunk in counted_positions(labels).split(CHUNK_TOKENS):
                flat_tokens[chunk] = exit_logits(self.causal_lm, flat_states[chunk]).argmax(-1)
        return flat_tokens.view_as(tokens)


class DraftMeter:
    """KL divergence, cross entropy and agreement, summed since ``read`` was last called."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, comparison: Comparison) -> None:
        self.totals[0] += comparison.kl
        self.totals[1] += comparison.cross_entropy
        self.totals[2] += comparison.matches.sum()
        self.totals[3] += len(comparison.matches)

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
        target = self.target
        found = compare(
            target.causal_lm,
            self._state.flatten(0, 1),
            target.states,
            positions,
            self.distill,
            target.rows,
            target.tokens,
        )
        if self.meter is not None:
            self.meter.add(found)
        self.matches = torch.zeros(labels.numel(), dtype=torch.bool, device=positions.device)
        self.matches[positions] = found.matches
        self.matches = self.matches.view(labels.shape)
        if num_items_in_batch is None:
            return found.loss / max(len(positions), 1)
        return found.loss / num_items_in_batch
