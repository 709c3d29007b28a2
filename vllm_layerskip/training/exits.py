# SPDX-License-Identifier: Apache-2.0
"""Exit states of a transformers decoder, and what each exit would predict.

Works on any ``*ForCausalLM`` whose decoder is ``model.model`` with ``layers`` and
``norm`` and whose head is ``lm_head``: the final norm and the head are shared by all
exits, as in the paper.

Shapes: B samples, T tokens, V vocabulary, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def record_exit_states(
    model: nn.Module, dropout_rates: Sequence[float] | None = None
) -> Iterator[list[torch.Tensor]]:
    """Collect each layer's output ``[B, T, H]`` while the block runs the model.

    With ``dropout_rates`` (one per layer) a layer is skipped for a random share of the
    samples: their hidden states pass it unchanged.
    """
    states: list[torch.Tensor] = []

    def hook(layer_index: int) -> Callable[..., torch.Tensor]:
        def record(_module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            rate = dropout_rates[layer_index] if dropout_rates else 0.0
            if rate > 0.0:
                skip = torch.rand(output.shape[0], device=output.device) < rate
                output = torch.where(skip[:, None, None], args[0], output)
            states.append(output)
            return output

        return record

    layers = model.model.layers
    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def exit_logits(model: nn.Module, state: torch.Tensor) -> torch.Tensor:
    """Exit head: final norm and LM head on an exit state. ``[..., H] -> [..., V]``"""
    return model.lm_head(model.model.norm(state))
