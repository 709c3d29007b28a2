# SPDX-License-Identifier: Apache-2.0
"""torch replacements against the interpreted Triton kernels that they replace.

Catches other random bits (seeds would lose their meaning), a row that should not be
sampled or cached, and a top-p that keeps another set of tokens.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.triton_utils import dispatcher, tl
from vllm.v1.sample.ops import topk_topp_triton
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

from vllm_layerskip import cpu_kernels

cpu_kernels.register()
interpreted_gumbel, _ = dispatcher._registry[cpu_kernels.GUMBEL_SAMPLE]
interpreted_resample, _ = dispatcher._registry[cpu_kernels.RESAMPLE]


@pytest.fixture
def interpreter_log1p(monkeypatch):
    """What the interpreter lacks of libdevice."""
    libdevice = SimpleNamespace(log1p=lambda value: tl.log(1.0 + value))
    monkeypatch.setattr(rejection_sampler_utils, "tldevice", libdevice)


def draw(kernel, monkeypatch, **kwargs):
    monkeypatch.setattr(gumbel, "_gumbel_sample_kernel", kernel)
    return gumbel.gumbel_sample(**kwargs)


@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("is_drafting", [False, True])
@pytest.mark.parametrize("vocab_size", [7, 1500])
def test_gumbel_draws_the_kernels_tokens(monkeypatch, vocab_size, is_drafting, use_fp64):
    generator = torch.Generator().manual_seed(vocab_size)
    num_tokens, max_num_reqs = 40, 6
    arguments = {
        "logits": torch.randn(num_tokens, vocab_size, generator=generator) * 2,
        "expanded_idx_mapping": torch.randint(0, max_num_reqs, (num_tokens,), generator=generator),
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.3, 0.2, 5.0]),
        "seed": torch.tensor([0, 1, -5, 2**40 + 3, 2**62, 77]),
        "pos": torch.randint(0, 5000, (num_tokens,), generator=generator),
        "apply_temperature": is_drafting,
        "is_drafting": is_drafting,
        "use_fp64": use_fp64,
    }
    expected = draw(interpreted_gumbel, monkeypatch, **arguments)
    actual = draw(
        dispatcher.KernelOverride(interpreted_gumbel, cpu_kernels.gumbel_sample),
        monkeypatch,
        **arguments,
    )
    assert actual.tolist() == expected.tolist()
    assert len(set(actual.tolist())) > 3


@pytest.mark.parametrize("per_token_column", [False, True])
def test_gumbel_caches_the_same_rows(monkeypatch, per_token_column):
    num_tokens, max_num_reqs, vocab_size = 4, 5, 11
    columns = torch.tensor([0, 2, 1, 0]) if per_token_column else torch.tensor(1)
    caches = []
    for kernel in (
        interpreted_gumbel,
        dispatcher.KernelOverride(interpreted_gumbel, cpu_kernels.gumbel_sample),
    ):
        cache = torch.zeros(max_num_reqs, 3, vocab_size)
        draw(
            kernel,
            monkeypatch,
            logits=torch.arange(num_tokens * vocab_size).view(num_tokens, vocab_size).float(),
            expanded_idx_mapping=torch.tensor([3, -1, 0, 4]),
            temperature=torch.ones(max_num_reqs),
            seed=torch.arange(max_num_reqs),
            pos=torch.arange(num_tokens),
            apply_temperature=True,
            is_drafting=True,
            logits_cache=cache,
            logits_cache_col=columns,
        )
        caches.append(cache)
    assert torch.equal(*caches)
    assert caches[0].count_nonzero() > 2 * vocab_size


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]] * 4))
    top_k = torch.tensor([5, 2, 5, 3], dtype=torch.int32)
    top_p = torch.tensor([1.0, 1.0, 0.6, 0.6])
    kept = topk_topp_triton.apply_top_k_top_p_triton(logits.clone(), top_k, top_p).isfinite()
    # Row 3: top 3 renormalised is 0.59, 0.24, 0.18, so 0.6 is reached by two.
    assert kept.sum(-1).tolist() == [5, 2, 2, 2]
    assert kept[:, 0].all()
    assert top_k.tolist() == [5, 2, 5, 3], "the sampler's own state was changed"
    only_p = topk_topp_triton.apply_top_k_top_p_triton(logits.clone(), None, top_p).isfinite()
    assert only_p.sum(-1).tolist() == [5, 5, 2, 2]
    only_k = topk_topp_triton.apply_top_k_top_p_triton(logits.clone(), top_k, None).isfinite()
    assert only_k.sum(-1).tolist() == [5, 2, 5, 3]


@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("mode", ["one-hot", "draft-logits", "block"])
@pytest.mark.parametrize("vocab_size", [9, 1300])
def test_resampling_draws_the_kernels_tokens(
    monkeypatch, interpreter_log1p, vocab_size, mode, use_fp64
):
    generator = torch.Generator().manual_seed(vocab_size)
    num_reqs, num_drafts = 12, 3
    num_logits = num_reqs * (num_drafts + 1)
    temperature = torch.full((num_reqs,), 0.8)
    temperature[::4] = 0.0
    expanded = torch.arange(num_reqs).repeat_interleave(num_drafts + 1)
    draft_logits = torch.randn(num_reqs, num_drafts, vocab_size, generator=generator)
    drafts = torch.randint(0, vocab_size, (num_logits,), generator=generator)
    drafts[6] = -1  # A draft that the grammar dropped.
    sampled = []
    for kernel in (
        interpreted_resample,
        dispatcher.KernelOverride(interpreted_resample, cpu_kernels.resample),
    ):
        monkeypatch.setattr(rejection_sampler_utils, "_resample_kernel", kernel)
        result, num_sampled = rejection_sampler_utils.rejection_sample(
            torch.randn(num_logits, vocab_size, generator=torch.Generator().manual_seed(5)) / 0.8,
            None if mode == "one-hot" else draft_logits,
            drafts,
            torch.arange(0, num_logits + 1, num_drafts + 1, dtype=torch.int32),
            torch.arange(num_logits),
            torch.arange(num_reqs),
            expanded,
            torch.arange(num_drafts + 1, dtype=torch.int32).repeat(num_reqs),
            temperature,
            torch.arange(num_reqs),
            num_drafts,
            use_fp64=use_fp64,
            use_block_verification=mode == "block",
        )
        emitted = torch.arange(num_drafts + 1) < num_sampled[:, None]
        sampled.append(torch.where(emitted, result, -1).tolist())
    assert sampled[0] == sampled[1]
    assert len({tuple(row) for row in sampled[0]}) > num_reqs // 2
