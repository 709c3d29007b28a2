# SPDX-License-Identifier: Apache-2.0
"""The tokens that drafts may be, and the rows of the LM head that belong to them.

With a draft vocabulary drafts are compared with the target among its tokens only, as they are
drafted in the engine. The loss then costs its share of the LM head, which in a small model
outweighs the layers that draft. (The target's argmax is that of the whole head: ``loss.py``.)

Shapes: D tokens of the draft vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class HeadRows:
    """The rows of a model's LM head that drafts are trained with."""

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        """Copies the rows of ``token_ids``, which ascend.

        Raises:
            TypeError: the LM head is no linear layer.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise TypeError(f"the LM head is a {type(head).__name__}, not a linear layer")
        self._model = model
        self.token_ids = torch.tensor(token_ids, device=head.weight.device)
        self._picked = nn.Linear(
            head.in_features, len(token_ids), head.bias is not None,
            head.weight.device, head.weight.dtype,
        ).requires_grad_(False)  # fmt: skip
        self._picked.weight.data = head.weight.detach()[self.token_ids]
        if head.bias is not None:
            self._picked.bias.data = head.bias.detach()[self.token_ids]

    @contextmanager
    def picked(self) -> Iterator[None]:
        """Within this block the model's logits are those of the listed tokens, ``[.., D]``."""
        model = self._model
        head = model.get_output_embeddings()  # type: ignore[operator]
        model.set_output_embeddings(self._picked)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_output_embeddings(head)  # type: ignore[operator]

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[N]``: the place of each token in the list; -1 where it is not listed."""
        found = torch.searchsorted(self.token_ids, tokens).clamp(max=len(self.token_ids) - 1)
        return torch.where(self.token_ids[found] == tokens, found, -1)
