# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with layer dropout and the early-exit loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from vllm_layerskip.training.exits import exit_logits, record_exit_states
from vllm_layerskip.training.recipe import Recipe, exit_loss_weights, layer_dropout_rates


class LayerSkipTrainer(Trainer):
    """Train ``J(t) = sum_l e~(t, l) CE(exit_l, labels)`` (paper, section 4.1.2).

    ``inputs["input_ids"]`` has shape ``[B, T]``; every token is predicted from those
    before it, so there are no padded positions to mask.
    """

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        input_ids = inputs["input_ids"]
        # A compiled or distributed model is wrapped; its layers and head are the same objects.
        causal_lm = self.accelerator.unwrap_model(model)
        num_layers = causal_lm.config.num_hidden_layers
        schedule = (num_layers, self.state.global_step, self.state.max_steps)
        rates = layer_dropout_rates(self.recipe, *schedule) if model.training else None
        with record_exit_states(causal_lm, rates) as states:
            causal_lm.model(input_ids=input_ids, use_cache=False)
        labels = input_ids[:, 1:].flatten()  # [B * (T - 1)]
        loss = torch.zeros((), device=input_ids.device)
        for weight, state in zip(exit_loss_weights(self.recipe, *schedule), states, strict=True):
            if weight > 0.0:
                logits = exit_logits(causal_lm, state[:, :-1]).flatten(0, 1)
                loss = loss + weight * F.cross_entropy(logits.float(), labels)
        return (loss, {}) if return_outputs else loss
