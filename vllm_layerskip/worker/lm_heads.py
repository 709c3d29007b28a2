# SPDX-License-Identifier: Apache-2.0
"""A model with another LM head, which drafts may have."""

from __future__ import annotations

import copy
from typing import Any

from vllm_layerskip.worker.twin_linear import has_plain_weight


def is_plain_head(lm_head: Any) -> bool:
    """Whether an LM head is a plain matrix whose rows can be read."""
    shape = (lm_head.num_embeddings_per_partition, lm_head.embedding_dim)
    return has_plain_weight(lm_head) and lm_head.weight.shape == shape


def with_head(model: Any, lm_head: Any) -> Any:
    """``model`` with another LM head; it shares the code, the other modules and the weights."""
    logits_processor = copy.copy(model.logits_processor)
    logits_processor.vocab_size = logits_processor.org_vocab_size = lm_head.org_vocab_size
    view = copy.copy(model)
    view._modules = {
        **model._modules,
        "lm_head": lm_head,
        "logits_processor": logits_processor,
    }
    return view
