# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling that returns the log probabilities of token ids that a request names.

``SamplingParams.logprob_token_ids`` is read by vLLM's sampler and not by its rejection sampler,
which answers with the wrong number of columns, or none. Everything else is vLLM's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class LogprobRejectionSampler(RejectionSampler):
    _num_token_ids = 0
    """Most token ids that a request of the batch names."""
    _expanded_idx_mapping: torch.Tensor
    """The request slot of each row of logits, of the requests that are being verified."""

    def __call__(
        self, logits: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any
    ) -> SamplerOutput:
        # One width for all chunks of a batch; host data.
        self._num_token_ids = self.sampler.logprob_token_ids_state.max_num_token_ids(
            input_batch.idx_mapping_np
        )
        return super().__call__(logits, input_batch, *args, **kwargs)

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        *args: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # vLLM verifies a chunk of requests, and then asks for its log probabilities.
        self._expanded_idx_mapping = expanded_idx_mapping
        return super()._verify(
            logits,
            draft_logits,
            draft_sampled,
            pos,
            cu_num_logits,
            idx_mapping,
            idx_mapping_np,
            expanded_idx_mapping,
            *args,
        )

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,  # [R, K + 1]
        num_sampled: torch.Tensor,  # [R]
        logits: torch.Tensor,  # [number of logits, V]
        cu_num_logits: torch.Tensor,  # [R + 1]
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,  # of a request of the batch; -1 if none wants any
    ) -> LogprobsTensors | None:
        arguments = (sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np)
        if self._num_token_ids == 0:
            return super()._get_logprobs_tensors(*arguments, max_num_logprobs)
        of_sampled = super()._get_logprobs_tensors(*arguments, 0)
        assert of_sampled is not None
        return compute_topk_scores(
            logits,
            max(max_num_logprobs, 0),
            of_sampled.logprob_token_ids[:, 0].contiguous(),
            of_sampled.cu_num_generated_tokens,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=self._expanded_idx_mapping,
            max_per_req_token_ids=self._num_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
