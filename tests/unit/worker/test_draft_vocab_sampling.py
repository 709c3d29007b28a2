# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling stays exact when drafts come from a draft vocabulary.

What a draft head hands to vLLM is a proposal of probability 0 (a logit of -inf) outside of
the draft vocabulary. vLLM's own draft sampler and rejection sampler run here on hundreds of
requests at once, without an engine; the tokens that come out must be the target's.
"""

import pytest
import torch
from scipy.stats import chisquare
from vllm.triton_utils import dispatcher, tl
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

from vllm_layerskip.cpu import kernels as cpu_kernels

cpu_kernels.register()

VOCAB_SIZE = 8
DRAFT_VOCAB = [1, 2, 6]
NUM_DRAFTS = 1
TEMPERATURE = 0.7
SMALLEST_P = 1e-4  # Seeds are fixed: no false alarm comes by chance.


def _draft_logits(num_reqs):
    """``[num_reqs, NUM_DRAFTS, V]``: every request has the same proposals."""
    proposals = torch.randn(NUM_DRAFTS, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    logits = torch.full((num_reqs, NUM_DRAFTS, VOCAB_SIZE), -float("inf"))
    logits[..., DRAFT_VOCAB] = 1.5 * proposals[:, DRAFT_VOCAB]
    return logits


def _target_logits(masked):
    """``[NUM_DRAFTS + 1, V]`` after temperature; ``masked`` as top-k leaves it."""
    logits = torch.randn(NUM_DRAFTS + 1, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    logits[:, masked] = -float("inf")
    return logits / TEMPERATURE


def _sample(draft_logits, target_logits, method):
    """``(tokens, num_sampled, drafts)`` of one step of every request."""
    num_reqs = len(draft_logits)
    slots, seeds = torch.arange(num_reqs), torch.arange(num_reqs) * 7919
    temperature = torch.full((num_reqs,), TEMPERATURE)
    cache = torch.zeros_like(draft_logits)
    drafts = torch.zeros(num_reqs, NUM_DRAFTS, dtype=torch.int64)
    for step in range(NUM_DRAFTS):
        drafts[:, step] = gumbel_sample(
            draft_logits[:, step].contiguous(),
            slots,
            temperature,
            seeds,
            torch.full((num_reqs,), 10 + step),
            apply_temperature=True,
            is_drafting=True,
            logits_cache=cache,
            logits_cache_col=torch.tensor(step),
        )
    rows = torch.cat([torch.zeros(num_reqs, 1, dtype=torch.int64), drafts], dim=1)
    tokens, num_sampled = rejection_sampler_utils.rejection_sample(
        target_logits.repeat(num_reqs, 1),
        cache,
        rows.flatten(),
        torch.arange(num_reqs + 1, dtype=torch.int32) * (NUM_DRAFTS + 1),
        (10 + torch.arange(NUM_DRAFTS + 1)).repeat(num_reqs),
        slots,
        slots.repeat_interleave(NUM_DRAFTS + 1),
        torch.arange(NUM_DRAFTS + 1, dtype=torch.int32).repeat(num_reqs),
        temperature,
        seeds,
        NUM_DRAFTS,
        use_block_verification=method == "block",
    )
    return tokens, num_sampled, drafts


def _assert_drawn_from(tokens, logits):
    expected = logits.double().softmax(-1) * len(tokens)
    observed = torch.bincount(tokens, minlength=VOCAB_SIZE)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert chisquare(observed[possible], expected[possible]).pvalue > SMALLEST_P


@pytest.mark.parametrize(
    ("method", "masked"),
    [("standard", []), ("standard", [1, 2]), ("block", [2, 4])],
    ids=["standard", "top-k", "block-top-k"],
)
def test_tokens_are_drawn_from_the_target(method, masked):
    target = _target_logits(masked)
    tokens, num_sampled, drafts = _sample(_draft_logits(300), target, method)
    assert set(drafts.flatten().tolist()) == set(DRAFT_VOCAB)
    assert set(num_sampled.tolist()) == {1, 2}, "rejected and accepted drafts"
    # The target's logits depend on the position alone, and so must the tokens.
    _assert_drawn_from(tokens[:, 0], target[0])
    _assert_drawn_from(tokens[num_sampled == 2, 1], target[1])
    with pytest.raises(AssertionError):
        # Negative control: another distribution is told apart.
        _assert_drawn_from(tokens[:, 0], target[1])


@pytest.mark.parametrize("masked", [[], [2, 4]], ids=["all", "top-k"])
@pytest.mark.parametrize("method", ["standard", "block"])
def test_the_cpu_kernel_draws_the_kernels_tokens(monkeypatch, method, masked):
    replacement = rejection_sampler_utils._resample_kernel
    name = f"{rejection_sampler_utils.__name__}._resample_kernel"
    interpreted, _ = dispatcher._registry[name]
    assert replacement is not interpreted
    # The function of libdevice that the interpreter lacks.
    log1p = type("libdevice", (), {"log1p": staticmethod(lambda value: tl.log(1.0 + value))})
    monkeypatch.setattr(rejection_sampler_utils, "tldevice", log1p)
    sampled = []
    for kernel in (interpreted, replacement):
        monkeypatch.setattr(rejection_sampler_utils, "_resample_kernel", kernel)
        target = _target_logits(masked)
        tokens, num_sampled, _ = _sample(_draft_logits(30), target, method)
        emitted = torch.arange(NUM_DRAFTS + 1) < num_sampled[:, None]
        sampled.append(torch.where(emitted, tokens, -1).tolist())
    assert sampled[0] == sampled[1]
    assert not {token for row in sampled[0] for token in row} & set(masked)
