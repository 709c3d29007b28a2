# SPDX-License-Identifier: Apache-2.0
"""Catch log probabilities of other token ids than a request named, or of another request's."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_layerskip.worker.logprob_rejection_sampler import LogprobRejectionSampler

VOCAB, K = 32, 2
NAMED = {0: [5, 20, 30], 2: [7]}  # By request slot; slot 1 names none.


@pytest.fixture
def sampler():
    # vLLM's LogprobTokenIdsState, without its pinned memory.
    num_token_ids = torch.tensor([len(NAMED.get(slot, ())) for slot in range(3)]).to(torch.int32)
    token_ids = torch.zeros(3, 128, dtype=torch.int32)
    for slot, ids in NAMED.items():
        token_ids[slot, : len(ids)] = torch.tensor(ids)
    state = SimpleNamespace(
        num_token_ids=SimpleNamespace(gpu=num_token_ids),
        token_ids=SimpleNamespace(gpu=token_ids),
        max_num_token_ids=lambda idx_mapping_np: int(num_token_ids[idx_mapping_np].max()),
    )
    sampler = object.__new__(LogprobRejectionSampler)
    sampler.enable_adaptive_verification = False
    sampler.sampler = SimpleNamespace(logprob_token_ids_state=state, logprobs_mode="raw_logprobs")
    return sampler


def verify(sampler, slots, max_num_logprobs):
    """Logits and what the sampler returns for them; each request accepts one of two drafts."""
    num_logits = len(slots) * (K + 1)
    logits = torch.randn(num_logits, VOCAB, generator=torch.Generator().manual_seed(0))
    sampled = torch.arange(num_logits).view(len(slots), K + 1)
    cu_num_logits = torch.arange(0, num_logits + 1, K + 1, dtype=torch.int32)
    expanded = torch.tensor(slots).repeat_interleave(K + 1).to(torch.int32)

    def call(self, logits, input_batch):
        with mock.patch.object(RejectionSampler, "_verify"):
            self._verify(logits, None, None, None, cu_num_logits, None, None, expanded)
        return self._get_logprobs_tensors(
            sampled,
            torch.full((len(slots),), 2, dtype=torch.int32),
            logits,
            cu_num_logits,
            cu_num_logits.numpy(),
            max_num_logprobs,
        )

    with mock.patch.object(RejectionSampler, "__call__", call):
        found = sampler(logits, SimpleNamespace(idx_mapping_np=np.array(slots)))
    return logits, sampled, found


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0], [1, 0]])
@pytest.mark.parametrize("max_num_logprobs", [-1, 0, 2])
def test_named_token_ids_come_with_their_log_probabilities(sampler, slots, max_num_logprobs):
    logits, sampled, found = verify(sampler, slots, max_num_logprobs)
    expected = logits.log_softmax(-1)
    for row, slot in enumerate(slots):
        for position in range(2):  # What was sampled: an accepted draft and the next token.
            logit = row * (K + 1) + position
            wanted = NAMED.get(slot) or logits[logit].topk(max(max_num_logprobs, 0))[1].tolist()
            ids = [int(sampled[row, position]), *wanted]
            assert found.logprob_token_ids[logit, : len(ids)].tolist() == ids
            torch.testing.assert_close(
                found.logprobs[logit, : len(ids)], expected[logit, torch.tensor(ids)]
            )
            assert bool(found.logprobs[logit, len(ids) :].isneginf().all())
    assert found.cu_num_generated_tokens == list(range(0, len(logits) + 1, K + 1))


@pytest.mark.parametrize(("max_num_logprobs", "columns"), [(-1, None), (0, 1), (2, 3)])
def test_without_named_token_ids_vllms_own_answer_stands(sampler, max_num_logprobs, columns):
    found = verify(sampler, [1], max_num_logprobs)[2]
    assert found is None if columns is None else found.logprobs.shape[1] == columns
