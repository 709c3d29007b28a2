# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with layer dropout and the early-exit loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from vllm_layerskip.evaluation.exits import check_decoder
from vllm_layerskip.training.atomic_saves import AtomicSaves
from vllm_layerskip.training.dropout import kept_samples
from vllm_layerskip.training.loss import ExitLoss, ExitMeter, positive
from vllm_layerskip.training.recipe import Recipe, exit_loss_weights, layer_dropout_rates


class LayerSkipTrainer(AtomicSaves):
    """A Trainer for a causal language model, of transformers or wrapped by peft.

    In training the loss is J(t), and layers are dropped by sample. In evaluation no layer is
    dropped, ``eval_loss`` is the loss of the whole model, and ``eval_exit_E_loss`` that of each
    exit. With ``Recipe.off()`` it trains exactly as ``Trainer`` does.

    Batches need ``labels``; positions with label -100 are left out of every exit's loss.
    """

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        """Takes what ``Trainer`` takes.

        Raises:
            ValueError: the model has no exits, the recipe does not fit it, or an argument would
                bypass the early-exit loss.
        """
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        self.recipe = recipe
        # Under FSDP `self.model` becomes a wrapper; this stays the model in it.
        self.causal_lm: nn.Module = getattr(self.model, "get_base_model", lambda: self.model)()
        check_decoder(self.causal_lm)
        self.num_layers = len(self.causal_lm.model.layers)
        recipe.check_depth(self.num_layers)
        self._train_meter = ExitMeter(self.num_layers, self.args.device)
        self._eval_meter = ExitMeter(self.num_layers, self.args.device)
        self._micro_step = (-1, 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        exit_loss = self._training_loss(inputs) if model.training else self._evaluation_loss()
        with exit_loss.applied():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _training_loss(self, inputs: dict[str, Any]) -> ExitLoss:
        schedule = (self.num_layers, self.state.global_step, self.state.max_steps)
        rates = layer_dropout_rates(self.recipe, *schedule)
        kept = None
        if any(rates):
            kept = kept_samples(
                rates,
                num_samples=inputs["labels"].shape[0],
                seed=self.args.seed,
                step=self.state.global_step,
                micro_step=self._next_micro_step(),
            )
        return ExitLoss(
            self.causal_lm,
            positive(exit_loss_weights(self.recipe, *schedule)),
            self._train_meter,
            kept,
            always_run=self.args.world_size > 1,
        )

    def _evaluation_loss(self) -> ExitLoss:
        last = self.num_layers - 1
        weights = dict.fromkeys(range(last), 0.0) | {last: 1.0}
        return ExitLoss(self.causal_lm, weights, self._eval_meter)

    def _next_micro_step(self) -> int:
        """Position of this batch among those that the step accumulates."""
        step, count = self._micro_step
        count = count + 1 if step == self.state.global_step else 0
        self._micro_step = (self.state.global_step, count)
        return count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._train_meter.read(self._sum_over_ranks)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        exits = self._eval_meter.read(self._sum_over_ranks)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in exits.items()})
        return output

    def _sum_over_ranks(self, totals: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(totals, reduction="sum")


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what would leave the early exits untrained.

    Raises:
        ValueError: it names the argument.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} must be 0: it replaces the "
            "model's loss function, to which the exits' losses are added."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True must be False: its fused loss bypasses the exits' losses."
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True must be False: a compiled model would keep the dropped layers "
            "and the exits of the step at which it was traced."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process are not supported. Start one process for each, "
            "with torchrun or --num-workers, or set CUDA_VISIBLE_DEVICES to one of them."
        )
