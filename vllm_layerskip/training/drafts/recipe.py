# SPDX-License-Identifier: Apache-2.0
"""The section ``recipe`` of a run that trains a draft adapter. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Distill = Literal["kl", "argmax", "both"]


@dataclass(frozen=True)
class DraftRecipe:
    """The model stays frozen; adapters on layers 0..E-1 learn what its last layer says.

    Raises:
        ValueError: a value is outside of its range.
    """

    exit_layer: int
    """E: the layers that draft, and the only ones with adapters."""
    target: Literal["frozen"] = "frozen"
    distill: Distill = "kl"
    """What is learnt: the last layer's distribution (KL divergence), its argmax (cross entropy),
    or both (their sum)."""
    num_speculative_tokens: int = 4
    """K: the longest run of drafts that adapters are trained and scored for."""
    final_norm: bool = False
    """Also train a final norm of the drafts' own."""
    exit_translator: bool = False
    """Also train a linear map behind that norm, which begins as the least-squares map from exit
    states to last states (training/drafts/translator.py). It has H x H weights."""
    draft_vocab: str | None = None
    """File of the token ids that drafts may be, as for serving; drafts and the last layer are
    compared among these only. None: all."""
    remember_target: bool = False
    """Keep the last layer's states of each sample in the run folder (2 H bytes a token in bfloat16)
    as long as the run lasts, so that from the second epoch on the target runs layers 0..E-1
    alone."""

    def __post_init__(self) -> None:
        if self.exit_layer < 1:
            raise ValueError(f"exit_layer={self.exit_layer} (E) must be at least 1.")
        if self.num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} (K) must be at least 1."
            )

    def with_absolute_paths(self) -> DraftRecipe:
        if self.draft_vocab is None:
            return self
        return replace(self, draft_vocab=str(Path(self.draft_vocab).absolute()))

    def check_depth(self, num_layers: int) -> None:
        """Refuse an E that does not fit a model of ``num_layers`` layers.

        Raises:
            ValueError: no layer is left to learn from.
        """
        if self.exit_layer >= num_layers:
            raise ValueError(
                f"exit_layer={self.exit_layer} (E) must be in 1..{num_layers - 1}: the model has "
                f"{num_layers} layers, and the drafts learn from those that they skip."
            )
