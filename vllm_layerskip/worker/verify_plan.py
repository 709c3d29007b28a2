# SPDX-License-Identifier: Apache-2.0
"""What a verify step with reuse needs, and how it reaches the forward.

A plan belongs to the attention metadata of one forward and travels with it: vLLM hands the
metadata to live steps and to graph captures alike, and nothing else reaches both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context


@dataclass(frozen=True)
class VerifyPlan:
    """How the forward starts from the drafts' exit states.

    R rows, padding included, of ``num_speculative_tokens + 1`` tokens each. Every tensor is a view
    of a persistent buffer, since a captured graph reads it again at each replay.
    """

    num_speculative_tokens: int
    # [R] request slots; -1 for padding.
    idx_mapping: torch.Tensor
    # Both by early attention layer, for one token per row: the row's last draft.
    attn_metadata: dict[str, Any]
    slot_mappings: dict[str, torch.Tensor]

    @property
    def num_reqs(self) -> int:
        return self.idx_mapping.shape[0]


class VerifyAttnMetadata(dict[str, Any]):
    """Attention metadata by layer name, for a forward that follows a plan."""

    def __init__(self, attn_metadata: Mapping[str, Any], plan: VerifyPlan) -> None:
        super().__init__(attn_metadata)
        self.plan = plan


def current_verify_plan() -> VerifyPlan | None:
    """The plan of the forward that is running, None for an ordinary one."""
    attn_metadata = get_forward_context().attn_metadata
    return attn_metadata.plan if isinstance(attn_metadata, VerifyAttnMetadata) else None
