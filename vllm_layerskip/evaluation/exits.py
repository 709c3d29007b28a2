# SPDX-License-Identifier: Apache-2.0
"""Exit states of a transformers decoder, and what each exit would predict.

Works on any ``*ForCausalLM`` whose decoder is ``model.model`` with ``layers`` and ``norm``.
All exits share the final norm and whatever the model does after it (LM head, logit scale or
soft cap), as in the paper.

Shapes: B samples, T tokens, N positions, V vocabulary, H hidden, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

LOGITS_AT_ONCE = 1 << 25
"""Positions go through the head in chunks of about this many logits (float32: 128 MiB)."""

LayerCall = Callable[..., torch.Tensor]
AroundLayer = Callable[..., torch.Tensor]
"""``around(layer_index, call, hidden_states, **kwargs)``: runs the layer, or doesn't."""


def check_decoder(model: nn.Module) -> None:
    """Refuse a model whose exits cannot be computed.

    Raises:
        ValueError: ``model`` is no causal language model with ``model.layers``, ``model.norm``
            and an LM head.
    """
    decoder = getattr(model, "model", None)
    missing = [f"model.{name}" for name in ("layers", "norm") if not hasattr(decoder, name)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        missing.append("an LM head")
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no {' and no '.join(missing)}, so it has no early exits. "
            "Use a dense decoder-only model such as LlamaForCausalLM, MistralForCausalLM, "
            "Qwen2ForCausalLM or Qwen3ForCausalLM."
        )


@contextmanager
def around_layers(model: nn.Module, around: AroundLayer) -> Iterator[None]:
    """Let ``around`` call each decoder layer while the block runs the model.

    ``around`` sees the call as the decoder makes it: outside of gradient checkpointing (which
    calls the layer again in the backward pass), of hooks and of wrappers such as FSDP's.
    """
    layers = list(model.model.layers)
    classes = [type(layer) for layer in layers]
    try:
        for index, (layer, cls) in enumerate(zip(layers, classes, strict=True)):
            # A call looks `__call__` up in the class, so the class is what must change.
            layer.__class__ = _intercepted(cls)  # type: ignore[arg-type]
            object.__setattr__(layer, "_layerskip_around", functools.partial(around, index))
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls
            layer.__dict__.pop("_layerskip_around", None)


@functools.cache
def _intercepted(cls: type) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        around = self.__dict__["_layerskip_around"]
        output = around(functools.partial(cls.__call__, self), *args, **kwargs)
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                f"{cls.__name__} returns {type(output).__name__} instead of hidden states; "
                "such a model has no exits to train or to score."
            )
        return output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


@contextmanager
def observe_exit_states(
    model: nn.Module, observe: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``observe(layer_index, state [B, T, H])`` with each layer's output while the block runs
    the model. A state that ``observe`` does not keep needs no memory once the next layer has run.
    """

    def around(index: int, call: LayerCall, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        state = call(hidden_states, **kwargs)
        observe(index, state)
        return state

    with around_layers(model, around):
        yield


@contextmanager
def record_exit_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect each layer's output ``[B, T, H]`` while the block runs the model."""
    states: list[torch.Tensor] = []
    with observe_exit_states(model, lambda _index, state: states.append(state)):
        yield states


def exit_logits(model: nn.Module, state: torch.Tensor) -> torch.Tensor:
    """What the model predicts from an exit state. ``[..., H] -> [..., V]``

    The model's own forward computes them, with the normed exit state as its decoder's output: so
    they are scaled and capped as in the architecture.
    """
    hidden_states = model.model.norm(state.reshape(1, -1, state.shape[-1]))
    # The class's forward, not accelerate's on the instance: that one enters an autocast object
    # which must not be entered twice (we may be in a loss function), or autocast would stay on.
    with _decoder_output(model.model, hidden_states):
        logits = type(model).forward(model, inputs_embeds=hidden_states, return_dict=True).logits
    return logits.view(*state.shape[:-1], logits.shape[-1])


def exit_logits_by_chunk(model: nn.Module, state: torch.Tensor) -> Iterator[torch.Tensor]:
    """``exit_logits`` of ``state [N, H]``, for about ``LOGITS_AT_ONCE`` values at a time."""
    for chunk in state.split(max(LOGITS_AT_ONCE // model.config.vocab_size, 1)):
        yield exit_logits(model, chunk)


@contextmanager
def _decoder_output(decoder: nn.Module, hidden_states: torch.Tensor) -> Iterator[None]:
    own = decoder.__dict__.get("forward")

    def forward(*_args: Any, **_kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=hidden_states)

    decoder.forward = forward
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
