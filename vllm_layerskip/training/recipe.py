# SPDX-License-Identifier: Apache-2.0
"""The LayerSkip training recipe as plain formulas (arXiv 2404.16710, section 4.1).

Two ingredients: layer dropout, whose rate grows with depth (and, from scratch,
with time), and an early-exit loss in which every layer's output goes through the
model's *own* final norm and LM head. Nothing here depends on torch, so the numbers
can be checked against the paper by hand.

Layers are indexed ``l = 0 .. L-1`` and steps ``t = 0 .. T-1`` as in the paper. Exit
layer ``E`` of the serving side reads the output of layer ``l = E - 1``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

Curriculum = Literal["rotational", "gradual"]
ExitLossProfile = Literal["sum", "uniform"]


@dataclass(frozen=True)
class Recipe:
    """Knobs of the recipe; the defaults are the paper's for training from scratch.

    Raises:
        ValueError: a value lies outside the range that its formula is defined for.
    """

    max_layer_dropout: float = 0.1
    """p_max: dropout rate of the last layer at the end of training."""
    exit_loss_scale: float = 0.2
    """e_scale: 0 trains the last layer only, 1 weighs the exits most."""
    exit_loss_profile: ExitLossProfile = "sum"
    """How weights grow with depth: "sum" is the paper's, "uniform" weighs all exits alike."""
    curriculum: Curriculum = "rotational"
    rotation: int = 8
    """R: the rotational curriculum enables every R-th layer at a step."""
    from_scratch: bool = True
    """Ramp layer dropout up over the run (S_exp); False keeps it constant."""
    exit_layers: tuple[int, ...] | None = None
    """Exits that the loss sees beside the last layer, as numbers of executed layers (the
    serving side's E); None: all. The curriculum then counts these exits instead of layers."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_layer_dropout < 1.0:
            raise ValueError(
                f"max_layer_dropout={self.max_layer_dropout} (p_max) must be in [0, 1)."
            )
        if not 0.0 <= self.exit_loss_scale <= 1.0:
            raise ValueError(f"exit_loss_scale={self.exit_loss_scale} (e_scale) must be in [0, 1].")
        if self.curriculum not in ("rotational", "gradual"):
            raise ValueError(
                f"curriculum={self.curriculum!r} must be one of 'rotational', 'gradual'."
            )
        if self.exit_loss_profile not in ("sum", "uniform"):
            raise ValueError(
                f"exit_loss_profile={self.exit_loss_profile!r} must be one of 'sum', 'uniform'."
            )
        if self.rotation < 1:
            raise ValueError(f"rotation={self.rotation} (R) must be at least 1.")
        if self.exit_layers is not None:
            exits = tuple(sorted(set(self.exit_layers)))
            if not exits or exits[0] < 2:
                raise ValueError(
                    f"exit_layers={list(self.exit_layers)} must name at least one exit, each at "
                    "least 2: the output of the first layer has weight e(0) = 0 in the recipe. "
                    "Leave exit_layers out to train all exits."
                )
            object.__setattr__(self, "exit_layers", exits)

    @classmethod
    def off(cls) -> Recipe:
        """The twin's recipe: no layer dropout, loss on the last layer only."""
        return cls(max_layer_dropout=0.0, exit_loss_scale=0.0, rotation=1)

    def with_absolute_paths(self) -> Recipe:
        return self  # It names no file.

    def check_depth(self, num_layers: int) -> None:
        """Refuse a recipe that does not fit a model of ``num_layers`` layers.

        Raises:
            ValueError: R exceeds the number of exits, or an exit lies after the last layer.
        """
        if self.exit_layers is not None and self.exit_layers[-1] > num_layers:
            raise ValueError(
                f"exit_layers={list(self.exit_layers)} must lie in 2..{num_layers}: the model has "
                f"{num_layers} layers."
            )
        num_exits = len(candidate_exits(self, num_layers))
        if self.curriculum == "rotational" and self.rotation > num_exits:
            raise ValueError(
                f"rotation={self.rotation} (R) must be at most {num_exits}, the number of exits of "
                f"this model of {num_layers} layers: a larger R only adds steps without any exit."
            )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def layer_dropout_profile(num_layers: int) -> list[float]:
    """D(l) = exp(l ln 2 / (L-1)) - 1: 0 at the first layer, 1 at the last."""
    if num_layers == 1:
        return [0.0]
    return [math.exp(layer * math.log(2) / (num_layers - 1)) - 1 for layer in range(num_layers)]


def layer_dropout_time_scale(step: int, num_steps: int, from_scratch: bool) -> float:
    """S(t): 1 for continual training, exp(t ln 2 / (T-1)) - 1 from scratch."""
    if not from_scratch or num_steps <= 1:
        return 1.0
    return math.exp(min(step, num_steps - 1) * math.log(2) / (num_steps - 1)) - 1


def layer_dropout_rates(recipe: Recipe, num_layers: int, step: int, num_steps: int) -> list[float]:
    """p(l, t) = S(t) D(l) p_max for each layer."""
    scale = layer_dropout_time_scale(step, num_steps, recipe.from_scratch)
    return [scale * depth * recipe.max_layer_dropout for depth in layer_dropout_profile(num_layers)]


def exit_scales(
    num_layers: int, exit_loss_scale: float, profile: ExitLossProfile = "sum"
) -> list[float]:
    """e(l), the weight of each exit before normalisation.

    "sum", the paper's: e_scale * sum_{i<=l} i, and L-1 + e_scale * sum_{i<=L-2} i for the
    last layer. Exit l = 1 of 8 then weighs 1/28 of the last layer's, which a long training
    run can afford. "uniform" (known from torchtune's early-exit loss): e_scale for every
    exit, 1 for the last layer. The first layer's output is never an exit, as in the paper.
    """
    last = num_layers - 1
    if profile == "uniform":
        return [0.0] * (last > 0) + [exit_loss_scale] * (last - 1) + [1.0]
    scales = [exit_loss_scale * layer * (layer + 1) / 2 for layer in range(num_layers)]
    scales[last] = last + exit_loss_scale * last * (last - 1) / 2
    return scales


def candidate_exits(recipe: Recipe, num_layers: int) -> list[int]:
    """Layers ``l`` whose outputs may be exits, from the first to the last one."""
    if recipe.exit_layers is None:
        return list(range(num_layers))
    return sorted({exit_layer - 1 for exit_layer in recipe.exit_layers} | {num_layers - 1})


def enabled_exits(recipe: Recipe, num_layers: int, step: int, num_steps: int) -> list[bool]:
    """C(t, l): which exits the loss of this step sees. The last layer always is one.

    Rotational: every R-th exit, moved on by one each step. Gradual: of n exits from the last
    down to the first, one more every T / (2 n) steps, so all of them from T / 2. Without
    ``exit_layers`` every layer is an exit, which gives the paper's curricula.
    """
    candidates = candidate_exits(recipe, num_layers)
    num_exits = len(candidates)
    if recipe.curriculum == "rotational":
        on = [(i - step) % recipe.rotation == 0 for i in range(num_exits)]
    else:
        num_enabled = 1 + 2 * num_exits * step // max(num_steps, 1)
        on = [i >= num_exits - num_enabled for i in range(num_exits)]
    enabled = [False] * num_layers
    for layer, is_on in zip(candidates, on, strict=True):
        enabled[layer] = is_on
    enabled[num_layers - 1] = True
    return enabled


def exit_loss_weights(recipe: Recipe, num_layers: int, step: int, num_steps: int) -> list[float]:
    """e~(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i): sums to 1 over the layers."""
    enabled = enabled_exits(recipe, num_layers, step, num_steps)
    scales = exit_scales(num_layers, recipe.exit_loss_scale, recipe.exit_loss_profile)
    weights = [scale if on else 0.0 for scale, on in zip(scales, enabled, strict=True)]
    total = sum(weights)
    if total == 0:  # A one-layer model: e(0) = 0, yet its only exit is the model.
        return [0.0] * (num_layers - 1) + [1.0]
    return [weight / total for weight in weights]
