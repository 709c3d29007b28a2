# SPDX-License-Identifier: Apache-2.0
"""What the target said about each sample, kept from one epoch to the next.

The target is frozen, so it says the same each time. Its last states are kept in memory; K/V of the
layers that draft are not (they are larger, and those layers run fast).

Shapes: B samples, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Said(NamedTuple):
    """The target's last states, normed, ``[.., T, H]``, and its argmax ``[.., T]``."""

    states: torch.Tensor
    tokens: torch.Tensor


class TargetMemory:
    """Said by sample; a sample is told by its tokens and labels (padding is on the right)."""

    def __init__(self) -> None:
        self._said: dict[bytes, Said] = {}

    def recall(self, inputs: Mapping[str, Any]) -> Said | None:
        """What the target said about a batch; None if a sample of it is new."""
        ids = inputs["input_ids"]
        found = [self._said.get(key) for key, _ in _samples(inputs)]
        known = [said for said in found if said is not None]
        if len(known) < len(found):
            return None
        longest, device = ids.shape[1], ids.device
        return Said(
            torch.stack([_padded(said.states, longest) for said in known]).to(device),
            torch.stack([_padded(said.tokens[:, None], longest)[:, 0] for said in known]).to(
                device
            ),
        )

    def keep(self, inputs: Mapping[str, Any], said: Said) -> None:
        for row, (key, length) in enumerate(_samples(inputs)):
            self._said[key] = Said(
                said.states[row, :length].cpu().clone(), said.tokens[row, :length].cpu().clone()
            )


def _samples(inputs: Mapping[str, Any]) -> Iterator[tuple[bytes, int]]:
    """What tells each sample, and its length without padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    rows = torch.stack([ids, inputs["labels"]], 1).cpu()  # [B, 2, T]
    for row, length in zip(rows, lengths, strict=True):
        yield row[:, :length].numpy().tobytes(), length


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, length - len(rows)))
