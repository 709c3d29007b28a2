# SPDX-License-Identifier: Apache-2.0
"""A linear map behind the drafts' final norm: from what layer E says to what the last layer would.

Exit states of a model that was never trained for early exit point elsewhere than the last layer's.
One matrix turns most of the way (the "tuned lens" of arXiv 2303.08112), and the best one in the
least-squares sense needs no training: it is solved for. Training goes on from there.

Shapes: N positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_layerskip.evaluation.exits import around_layers
from vllm_layerskip.training.loss import counted_positions, shifted_labels

if TYPE_CHECKING:
    from vllm_layerskip.training.drafts.trainer import DraftTrainer

TOKENS_A_DIMENSION = 512
"""The fit uses so many tokens for each of H inputs, or all that there are."""
SLOWER = 0.02
"""The translator's share of the learning rate. Adapters begin at zero and may move fast; the
translator begins where least squares put it, which such steps would undo."""
_RIDGE = 1e-3
"""Of the mean square of an input, added to each: what data do not tell stays small."""


def add_translator(peft_model: nn.Module) -> None:
    """Give the drafts' own final norm a translator, which begins as the identity.

    It belongs to the norm that peft trains and saves, so the frozen model's norm has none.
    """
    norm = _own_norm(peft_model)
    size, weight = norm.weight.numel(), norm.weight
    norm.translator = nn.Linear(size, size, bias=False, device=weight.device, dtype=weight.dtype)
    if not weight.is_meta:
        nn.init.eye_(norm.translator.weight)
    norm.register_forward_hook(lambda module, _args, output: module.translator(output))


def translator_weight(peft_model: nn.Module) -> nn.Parameter:
    return _own_norm(peft_model).translator.weight


def slow_down(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    """Give a weight a group of its own, with ``SLOWER`` times the learning rate."""
    for group in list(optimizer.param_groups):
        others = [parameter for parameter in group["params"] if parameter is not weight]
        if len(others) < len(group["params"]):
            own = {**group, "params": [weight], "lr": group["lr"] * SLOWER}
            group["params"] = others
            optimizer.add_param_group(own)
            return


def _own_norm(peft_model: nn.Module) -> Any:
    base: Any = peft_model.get_base_model()  # type: ignore[operator]
    return base.model.norm.modules_to_save["default"]


class _Moments:
    """Sums of ``x x^T [H, H]`` and ``x y^T [H, H]`` over positions."""

    def __init__(self, size: int, device: torch.device) -> None:
        # Apple's and some other accelerators have no float64; the solve is on the CPU.
        self.xx, self.xy = torch.zeros(2, size, size, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.float(), y.float()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.num_tokens += len(x)

    def solve(self) -> torch.Tensor:
        """``[H, H]``, for ``y ~ W x``."""
        xx, xy = self.xx.cpu().double(), self.xy.cpu().double()
        xx += _RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype)
        return torch.linalg.solve(xx, xy).T


@torch.no_grad()
def fit_translator(trainer: DraftTrainer) -> int:
    """Set the translator to the least-squares map from exit states to last states, both normed.

    Returns:
        The number of tokens that it was fitted to.
    """
    norm = _own_norm(trainer.model)  # type: ignore[arg-type]
    size = norm.weight.numel()
    moments = _Moments(size, norm.weight.device)
    with torch.random.fork_rng():  # Training draws what it would draw without.
        _collect(trainer, norm, moments)
    norm.translator.weight.copy_(moments.solve())
    return moments.num_tokens


def _collect(trainer: DraftTrainer, norm: Any, moments: _Moments) -> None:
    size = norm.weight.numel()
    for batch in trainer.get_train_dataloader():
        inputs = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
        states = _exit_states(trainer, inputs)
        positions = counted_positions(shifted_labels(inputs["labels"], {}))
        normed = type(norm).forward(norm, states.flatten(0, 1)[positions])
        moments.add(normed, trainer.target.states[positions])
        if moments.num_tokens >= TOKENS_A_DIMENSION * size:
            break


def _exit_states(trainer: DraftTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    """``[B, T, H]``: what the frozen model's layer E-1 says; its last states are the target's."""
    states: list[torch.Tensor] = []

    def around(
        layer: int, call: Callable[..., torch.Tensor], state: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        output = call(state, **kwargs)
        if layer == trainer.recipe.exit_layer - 1:
            states.append(output)
        return output

    with trainer.accelerator.autocast(), around_layers(trainer.causal_lm, around):
        trainer.run_target(trainer.model, inputs)  # type: ignore[arg-type]
    trainer.target.kv.forget()
    return states[0]
