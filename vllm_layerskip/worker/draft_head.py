# SPDX-License-Identifier: Apache-2.0
"""The LM head of drafts that come from a draft vocabulary.

It copies the model head's rows for D of V token ids. Logits are computed by the model's own
``compute_logits`` on this smaller head, so scale, soft cap, bias and dtype are the model's.
This module returns the model's token ids, never indices of the draft vocabulary.

With tensor parallelism the D rows are spread over the ranks anew. Frequent tokens have low ids,
so most of them lie on the first rank's shard of the model's head; a head sliced shard by shard
would leave the other ranks with nothing to do.

Every tensor is allocated once and written in place: a captured CUDA graph may hold it. With a
draft twin the rows are rounded to the twin's kind, and the full-width ones are dropped.

Shapes: R rows, S request slots, H hidden size, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
)

from vllm_layerskip.config.draft_vocab import DraftVocab
from vllm_layerskip.twins.kinds import NONE
from vllm_layerskip.worker.lm_heads import is_plain_head, with_head
from vllm_layerskip.worker.twin_linear import twin_of_head

logger = init_logger("vllm.layerskip.draft_head")

_ROWS_AT_ONCE = 4096  # Bounds the memory beside the copy when weights are reloaded.


class DraftHead:
    """Logits and argmax over a draft vocabulary.

    Args:
        model: a ``LayerSkipForCausalLM`` whose weights are loaded.
        draft_vocab: the ids of the D rows.
        draft_logits: ``[S, K, V]``, the speculator's cache of the logits that drafts were
            sampled from; None if drafts are argmaxes: ``compute_logits`` is not called then.
        exit_model: what drafts end in, if that is not ``model`` (a twin's exit norm).
        kind: of numbers that the rows are rounded to.

    Raises:
        ValueError: the LM head is no plain matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        draft_vocab: DraftVocab,
        draft_logits: torch.Tensor | None,
        exit_model: nn.Module | None = None,
        kind: str = NONE,
    ) -> None:
        _require_plain_head(model.lm_head, draft_vocab)
        self._model = model
        self._draft_vocab = draft_vocab
        device = model.lm_head.weight.device
        # [D]
        self.token_ids = torch.empty(len(draft_vocab), dtype=torch.int64, device=device)
        # A buffer, since sleep level 2 discards weights but restores buffers: if weights then come
        # without ``load_weights``, ids out of range would otherwise be read.
        model.register_buffer("layerskip_draft_token_ids", self.token_ids, persistent=False)
        with device:
            self.lm_head = _empty_head(model.lm_head, len(draft_vocab))
            self._twin = None
            if kind != NONE:
                self._twin = twin_of_head(self.lm_head, kind, model.lm_head.weight.dtype)
        head = self.lm_head if self._twin is None else self._twin.module
        self._sliced_model = with_head(exit_model or model, head)
        # [S, V]; outside of the draft vocabulary -inf: a probability of 0.
        self._full_logits = None if draft_logits is None else torch.empty_like(draft_logits[:, 0])
        self._num_weight_changes = -1
        self.refresh()
        logger.info_once(
            "LayerSkip drafts are %d of %d token ids (%s); extra memory: %d bytes for their LM "
            "head.",
            len(draft_vocab),
            model.logits_processor.org_vocab_size,
            draft_vocab.source,
            self.num_bytes,
        )

    @property
    def num_bytes(self) -> int:
        """Extra memory on this rank."""
        own = (*self.lm_head.parameters(), self.token_ids, self._full_logits)
        num_twin_bytes = 0 if self._twin is None else self._twin.method.num_bytes
        return num_twin_bytes + sum(tensor.nbytes for tensor in own if tensor is not None)

    def refresh(self) -> None:
        """Copy the rows again if the model's weights may have changed since.

        Call it before the passes of a step, on every rank: it may communicate. It costs a
        comparison on the host when there is nothing to do.
        """
        if self._num_weight_changes == self._model.num_weight_changes:
            return
        is_first = self._num_weight_changes == -1
        self._num_weight_changes = self._model.num_weight_changes
        # Sleep level 2 discards these with the weights.
        self.token_ids.copy_(torch.tensor(self._draft_vocab.token_ids))
        if self._full_logits is not None:
            self._full_logits.fill_(-float("inf"))
        if self._twin is not None:
            self._make_twin()
        elif _copy_rows(self._model.lm_head, self.lm_head, self.token_ids) or is_first:
            # The platform's hook; on a CPU it packs the weight for the kernels, which takes long.
            self.lm_head.quant_method.process_weights_after_loading(self.lm_head)

    def _make_twin(self) -> None:
        """Copy the rows, round them, and drop them."""
        assert self._twin is not None
        for parameter in self.lm_head.parameters():
            shape = (self._twin.shape[0], *parameter.shape[1:])
            parameter.data = parameter.new_empty(shape)
        _copy_rows(self._model.lm_head, self.lm_head, self.token_ids)
        self._twin.make()
        for parameter in self.lm_head.parameters():
            parameter.data = parameter.new_empty(0, *parameter.shape[1:])

    def compute_logits(
        self,
        hidden_states: torch.Tensor,  # [R, H]
    ) -> torch.Tensor:
        """``[R, V]`` logits, -inf outside of the draft vocabulary; valid until the next call."""
        assert self._full_logits is not None
        logits = self._sliced_model.compute_logits(hidden_states)
        full = self._full_logits[: logits.shape[0]]
        return full.index_copy_(1, self.token_ids, logits.to(full.dtype))

    def get_top_tokens(
        self,
        hidden_states: torch.Tensor,  # [R, H]
    ) -> torch.Tensor:
        """``[R]`` token ids of the largest logits."""
        return self.token_ids[self._sliced_model.get_top_tokens(hidden_states)]


def _require_plain_head(lm_head: Any, draft_vocab: DraftVocab) -> None:
    if not is_plain_head(lm_head):
        raise ValueError(
            f"{draft_vocab.source} needs the rows of the LM head, and this model keeps it in the "
            f"format of {type(lm_head.quant_method).__name__}. Set draft_vocab='none' "
            "(--draft-vocab none), or use a checkpoint whose LM head is not quantised."
        )


def _empty_head(lm_head: Any, num_rows: int) -> ParallelLMHead:
    """A head of ``num_rows`` rows, split over ``lm_head``'s ranks."""
    return ParallelLMHead(
        num_rows,
        lm_head.embedding_dim,
        bias=getattr(lm_head, "bias", None) is not None,
        params_dtype=lm_head.weight.dtype,
        padding_size=math.lcm(DEFAULT_VOCAB_PADDING_SIZE, lm_head.tp_size),
        disable_tp=lm_head.disable_tp,
    )


@torch.no_grad()
def _copy_rows(
    source: Any,  # LM head of V rows
    target: ParallelLMHead,  # of D rows
    token_ids: torch.Tensor,  # [D]
) -> bool:
    """Fill this rank's shard of ``target`` with rows of all shards of ``source``.

    Returns False if they are known to be the rows that it had. Only a CPU knows: elsewhere the
    answer would make the host wait for the device.
    """
    changed = token_ids.device.type != "cpu"
    shard = target.shard_indices
    own_start, own_end = shard.org_vocab_start_index, shard.org_vocab_end_index
    for name, parameter in target.named_parameters():
        parameter[own_end - own_start :].zero_()  # Padding.
        for start in range(0, len(token_ids), _ROWS_AT_ONCE):
            rows = _rows(source, getattr(source, name), token_ids[start : start + _ROWS_AT_ONCE])
            first, last = max(start, own_start), min(start + len(rows), own_end)
            if first < last:
                own = parameter[first - own_start : last - own_start]
                new = rows[first - start : last - start]
                changed = changed or not torch.equal(own, new)
                own.copy_(new)
    return changed


def _rows(
    source: Any,
    parameter: torch.Tensor,  # [V / ranks, ...] this rank's shard of ``source``
    token_ids: torch.Tensor,  # [N]
) -> torch.Tensor:
    """``[N, ...]`` rows of all ranks' shards; the same on each rank."""
    shard = source.shard_indices
    start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    elsewhere = (token_ids < start) | (token_ids >= end)
    rows = parameter[(token_ids - start).masked_fill_(elsewhere, 0)]
    rows[elsewhere] = 0
    # Every row is one rank's plus zeros: the sum is exact.
    return tensor_model_parallel_all_reduce(rows) if source.tp_size > 1 else rows
