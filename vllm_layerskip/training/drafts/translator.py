# SPDX-License-Identifier: Apache-2.0
"""A linear map behind the drafts' final norm: from what layer E says to what the last layer would.

Exit states of a model that was never trained for early exit point elsewhere than the last layer's.
One matrix turns most of the way (the "tuned lens" of arXiv 2303.08112), and the best one in the
least-squares sense needs no training: it is solved for. Training goes on from there.

Shapes: N positions, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vllm_layerskip.training.loss import counted_positions, shifted_labels

if TYPE_CHECKING:
    from vllm_layerskip.training.drafts.trainer import DraftTrainer

TOKENS_A_DIMENSION = 512
"""The fit uses so many tokens for each of H inputs, or all that there are."""
SLOWER = 0.02
"""The translator's share of the learning rate. Adapters begin at zero and may move fast; the
translator begins where least squares put it, which such steps would undo."""
_RIDGE = 1e-3
"""Of the mean square of an input, added to each: what data do not tell stays as it is."""
_SMALLEST = 1e-6


def add_translator(peft_model: nn.Module) -> None:
    """Give the drafts' own final norm a translator, which begins as the identity.

    It belongs to the norm that peft trains and saves, so the frozen model's norm has none.
    """
    norm = own_norm(peft_model)
    size, weight = norm.weight.numel(), norm.weight
    norm.translator = nn.Linear(size, size, bias=False, device=weight.device)
    if not weight.is_meta:
        nn.init.eye_(norm.translator.weight)
    norm.register_forward_hook(lambda module, _args, output: module.translator(output.float()))


def slow_down(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    """Give a weight a group of its own, with ``SLOWER`` times the learning rate."""
    for group in list(optimizer.param_groups):
        others = [parameter for parameter in group["params"] if parameter is not weight]
        if len(others) < len(group["params"]):
            own = {**group, "params": [weight], "lr": group["lr"] * SLOWER}
            group["params"] = others
            optimizer.add_param_group(own)
            return
    raise ValueError("the optimizer does not train the exit translator")


def own_norm(peft_model: nn.Module) -> Any:
    """The drafts' own final norm, beside the frozen model's."""
    base: Any = peft_model.get_base_model()  # type: ignore[operator]
    return base.model.norm.modules_to_save["default"]


class _Moments:
    """Sums of ``x x^T [H, H]`` and ``x (y - x)^T [H, H]`` over positions."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, size, size, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.double(), y.double()
        self.sums[0] += x.T @ x
        self.sums[1] += x.T @ (y - x)
        self.num_tokens += len(x)

    def solve(self) -> torch.Tensor:
        """``W [H, H]``, for ``y ~ W x``; what data do not tell is the identity's."""
        xx, difference = self.sums
        identity = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        xx = xx + (_RIDGE * xx.diagonal().mean() + _SMALLEST) * identity
        return torch.linalg.solve(xx, difference).T + identity


@torch.no_grad()
def fit_translator(trainer: DraftTrainer) -> int:
    """Set the translator to the least-squares map from exit states to last states, both normed.

    Returns:
        The number of tokens that it was fitted to.
    """
    norm = own_norm(trainer.model)  # type: ignore[arg-type]
    size = norm.weight.numel()
    moments = _Moments(size, norm.weight.device)
    _collect(trainer, norm, moments)
    moments.sums = trainer.accelerator.reduce(moments.sums, reduction="sum")
    norm.translator.weight.copy_(moments.solve())
    counted = torch.tensor(moments.num_tokens, device=moments.sums.device)
    return int(trainer.accelerator.reduce(counted, reduction="sum"))


def _collect(trainer: DraftTrainer, norm: Any, moments: _Moments) -> None:
    """Add samples that are spread over the data, each rank its own."""
    args, samples = trainer.args, trainer.train_dataset
    order = np.random.default_rng(args.seed).permutation(len(samples))  # type: ignore[arg-type]
    own = order[args.process_index :: args.world_size].tolist()
    wanted = TOKENS_A_DIMENSION * norm.weight.numel() / args.world_size
    size = args.per_device_train_batch_size
    for start in range(0, len(own), size):
        rows = [samples[row] for row in own[start : start + size]]  # type: ignore[index]
        batch = trainer.data_collator(rows)
        inputs = {name: tensor.to(args.device) for name, tensor in batch.items()}
        states = _exit_states(trainer, inputs)
        positions = counted_positions(shifted_labels(inputs["labels"], {}))
        normed = type(norm).forward(norm, states.flatten(0, 1)[positions])
        moments.add(normed, trainer.target.states[positions])
        if moments.num_tokens >= wanted:
            break


def _exit_states(trainer: DraftTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    """``[B, T, H]``: what the frozen model's layer E-1 says; its last states are the target's."""
    states: list[torch.Tensor] = []
    layer: Any = trainer.causal_lm.model.layers[trainer.recipe.exit_layer - 1]  # type: ignore[index,union-attr]
    hook = layer.register_forward_hook(lambda _layer, _args, output: states.append(output))
    try:
        trainer.run_target(trainer.model, inputs)  # type: ignore[arg-type]
    finally:
        hook.remove()
        trainer.target.kv.forget()
    return states[0]
