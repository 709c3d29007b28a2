# SPDX-License-Identifier: Apache-2.0
"""A model with another LM head, which drafts may have."""

from __future__ import annotations

import copy
from typing import Any

from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


def is_plain_head(lm_head: Any) -> bool:
    """Whether an LM head is a plain matrix whose rows can be read."""
    return isinstance(
        lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod
    ) and lm_head.weight.shape == (lm_head.num_embeddings_per_partition, lm_head.embedding_dim)


def require_plain_head(lm_head: Any, source: str, option: str) -> None:
    """Check that drafts may have an LM head of their own, made from the model's.

    Args:
        source: what asks for it, with its value, for the message.
        option: the name of the option.

    Raises:
        ValueError: the LM head is no plain matrix.
    """
    if not is_plain_head(lm_head):
        raise ValueError(
            f"{source} needs the rows of the LM head, and this model keeps it in the format of "
            f"{type(lm_head.quant_method).__name__}. Set {option}='none' "
            f"(--{option.replace('_', '-')} none), or use a checkpoint whose LM head is not "
            "quantised."
        )


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
