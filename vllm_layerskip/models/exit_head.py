# SPDX-License-Identifier: Apache-2.0
"""What drafting adds to a model, beside its own ``compute_logits``."""

from __future__ import annotations

from typing import Any

import torch


class ExitHead:
    """Mixin that gives a model an argmax over its LM head and a count of changes of its weights."""

    lm_head: Any
    logits_processor: Any

    num_weight_changes = 0
    """Calls of ``load_weights``, and of whatever else may have changed weights
    (``worker/weight_changes.py``). What was made from weights at another count is stale."""

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        self.num_weight_changes += 1
        return super().load_weights(*args, **kwargs)  # type: ignore[misc]

    def get_top_tokens(
        self,
        hidden_states: torch.Tensor,  # [R, H]
    ) -> torch.Tensor:
        """``[R]`` token ids of the largest logits, without gathering logits across ranks."""
        bias = getattr(self.lm_head, "bias", None)
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states, bias)
