# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer for draft adapters."""

from __future__ import annotations

import inspect
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_layerskip.training.atomic_saves import AtomicSaves
from vllm_layerskip.training.drafts.loss import DraftLoss, DraftMeter, TargetPass
from vllm_layerskip.training.drafts.memory import TargetMemory
from vllm_layerskip.training.drafts.recipe import DraftRecipe
from vllm_layerskip.training.drafts.rows import HeadRows
from vllm_layerskip.training.drafts.translator import fit_translator, own_norm, slow_down
from vllm_layerskip.training.trainer import check_arguments

REMEMBERED = "target"
"""Of what the target said, in the run folder."""


class DraftTrainer(AtomicSaves):
    """A Trainer for a frozen model with peft adapters on layers 0..E-1.

    Each batch runs through the frozen model, and then through layers 0..E-1 with adapters; the loss
    compares the two. Positions with label -100 do not count.
    """

    base_digest: str | None = None
    """Of the frozen model's checkpoint, for the adapter's record."""

    def __init__(
        self,
        *args: Any,
        recipe: DraftRecipe,
        draft_vocab: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes what ``Trainer`` takes.

        Args:
            draft_vocab: the ids of ``recipe.draft_vocab``, ascending.

        Raises:
            ValueError: the recipe does not fit the model, or an argument would bypass its loss.
        """
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        self.recipe = recipe
        self.draft_vocab = draft_vocab
        self.memory = (
            TargetMemory(Path(self.args.output_dir) / REMEMBERED)
            if recipe.remember_target
            else None
        )
        self.causal_lm: nn.Module = self.model.get_base_model()  # type: ignore[operator,union-attr]
        self.target = TargetPass(
            self.model,
            recipe.exit_layer,
            None if draft_vocab is None else HeadRows(self.causal_lm, draft_vocab),
            self.memory,
        )
        self.num_layers = len(self.causal_lm.model.layers)  # type: ignore[arg-type,union-attr]
        recipe.check_depth(self.num_layers)
        self._train_meter = DraftMeter(self.args.device)
        self._eval_meter = DraftMeter(self.args.device)
        self._speed = _SpeedMeter(self.args.device)
        parameters = inspect.signature(type(self.causal_lm).forward).parameters
        # Logits of a pass are not used: the loss makes its own, a chunk at a time.
        self._without_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        recipe, meter, offset = self.recipe, self._eval_meter, 0
        if model.training:
            meter = self._train_meter
            # Steps begin elsewhere each time, so that a position is every draft in turn.
            offset = self.state.global_step % recipe.num_speculative_tokens
            self._speed.add(inputs["input_ids"].numel())
        inputs = self.run_target(model, inputs)
        loss = DraftLoss(self.target, recipe.exit_layer, recipe.distill, meter)
        with loss.applied(recipe.num_speculative_tokens, offset):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def run_target(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the frozen model; returns the inputs of the drafts' pass."""
        inputs = {**inputs, "use_cache": False, **self._without_logits}
        with self.accelerator.autocast():
            self.target.run(model, inputs)
        return inputs

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.recipe.exit_translator:
            slow_down(optimizer, own_norm(self.model).translator.weight)
        return optimizer

    def begin(self) -> str:
        """Prepare a run that starts; returns what was done, in words."""
        if not self.recipe.exit_translator:
            return ""
        num_tokens = fit_translator(self)
        return f"The exit translator is fitted to {num_tokens} tokens."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._train_meter.read(self._sum_over_ranks)
            logs |= self._speed.read(self.args.world_size)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_meter.read(self._sum_over_ranks)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in means.items()})
        self._speed.restart()
        return output

    def _sum_over_ranks(self, totals: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(totals, reduction="sum")


class _SpeedMeter:
    """Tokens a second and the peak of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._num_tokens, self._since = 0, time.monotonic()

    def add(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def read(self, num_ranks: int) -> dict[str, float]:
        """Of all ranks since the last call, and the memory of this one since its start."""
        speed = self._num_tokens * num_ranks / max(time.monotonic() - self._since, 1e-9)
        self.restart()
        return {"tokens_per_s": round(speed, 1), "peak_memory_gib": round(self._peak_gib(), 3)}

    def _peak_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB.
