# SPDX-License-Identifier: Apache-2.0
"""torch replacements against the interpreted Triton kernels that they replace.

Catches other random bits (seeds would lose their meaning), a row that should not be
sampled, cached, stored or advanced, and a top-p that keeps another set of tokens. Integers
and drawn tokens are compared bit for bit; sums over a vocabulary to 1e-5.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.triton_utils import dispatcher, tl, triton
from vllm.v1.sample.ops import topk_topp_triton
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

from vllm_layerskip.cpu import kernels as cpu_kernels
from vllm_layerskip.cpu.kernels.randomness import philox_uniform
from vllm_layerskip.host import check, contacts, version

cpu_kernels.register()

BATCH = "vllm.v1.worker.gpu.input_batch"
GUMBEL = "vllm.v1.worker.gpu.sample.gumbel"
REJECTION = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
MAX_NUM_REQS = 9
SEEDS = range(6)


def kernels(path):
    """The interpreted kernel and what vLLM launches in its place."""
    original, launch = dispatcher._registry[path.replace(":", ".")]
    return original, dispatcher.KernelOverride(original, launch)


def run_both(path, grid, *args, **constexprs):
    """Tensors after the kernel and after its replacement, in the order of the arguments."""
    results = []
    for kernel in kernels(path):
        copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        kernel[grid](*copies, **constexprs)
        results.append([arg for arg in copies if isinstance(arg, torch.Tensor)])
    return results


def assert_same(path, grid, *args, **constexprs):
    """Bit-equal tensors, of which at least one changed."""
    before = [arg for arg in args if isinstance(arg, torch.Tensor)]
    expected, actual = run_both(path, grid, *args, **constexprs)
    for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
        assert torch.equal(one, other), f"tensor {index} of {path}"
    assert not all(torch.equal(one, other) for one, other in zip(before, expected, strict=True))


class Rows:
    """A random batch: rows in the middle of prefill, at its end, and decoding with drafts."""

    def __init__(self, seed: int, num_drafts: int = 3) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.num_reqs = self.draw(1, 7, ()).item()
        self.num_drafts = num_drafts
        self.idx_mapping = self.permutation()[: self.num_reqs].int()
        self.num_logits = self.draw(1, num_drafts + 2, (self.num_reqs,)).int()
        self.cu_num_logits = self.cumulated(self.num_logits)
        self.query_lens = self.num_logits + self.draw(0, 4, (self.num_reqs,)).int()
        self.query_start_loc = self.cumulated(self.query_lens)
        self.num_computed = self.draw(0, 20, (MAX_NUM_REQS,)).int()
        self.prefill_lens = self.draw(1, 25, (MAX_NUM_REQS,)).int()
        self.seq_lens = self.num_computed[self.idx_mapping.long()] + self.query_lens
        self.prefill_lens[self.idx_mapping[0]] = self.seq_lens[0]

    def draw(self, low, high, size):
        return torch.randint(low, high, size, generator=self.generator)

    def permutation(self):
        return torch.randperm(MAX_NUM_REQS, generator=self.generator)

    def cumulated(self, lengths):
        return torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()

    @property
    def total_logits(self):
        return int(self.cu_num_logits[-1])

    @property
    def num_tokens(self):
        return int(self.query_start_loc[-1])

    @property
    def expanded(self):
        return self.idx_mapping.repeat_interleave(self.num_logits)

    @property
    def local_pos(self):
        return torch.cat([torch.arange(n) for n in self.num_logits.tolist()]).int()


def test_every_kernel_is_replaced():
    for path in cpu_kernels.REPLACEMENTS:
        assert isinstance(check.resolve(path), dispatcher.KernelOverride), path


def test_every_kernel_of_vllms_is_a_contact():
    known = {contact.path for contact in contacts.CONTACTS}
    theirs = {path for path in cpu_kernels.REPLACEMENTS if path.startswith("vllm.")}
    assert theirs <= known
    kernels = {path for path in known if path.endswith("_kernel")}
    assert {path for path in kernels if "kernels.linear" not in path} == theirs


def test_a_kernel_that_changed_stays_as_it_is():
    with pytest.raises(TypeError, match="temp_ptr"):
        cpu_kernels.launcher(
            ("logits_ptr",), cpu_kernels.REPLACEMENTS[f"{GUMBEL}:_gumbel_sample_kernel"]
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_slot_mappings(seed):
    rows = Rows(seed)
    rows.idx_mapping[rows.draw(0, 4, (rows.num_reqs,)) == 0] = -1
    strides, block_sizes = [7, 3], [4, 16]
    tables = [rows.draw(0, 50, (MAX_NUM_REQS, stride)).int() for stride in strides]
    positions = rows.draw(0, 28, (rows.num_tokens + 2,))
    # A row without slots may be at a position that no block table has.
    owner = rows.idx_mapping.repeat_interleave(rows.query_lens)
    positions[: rows.num_tokens][owner < 0] += 10**6
    for enabled in ([True, True], [True, False]):
        assert_same(
            "vllm.v1.worker.gpu.block_table:_compute_slot_mappings_kernel",
            (2, rows.num_reqs + 1),
            rows.num_tokens + 5,
            rows.idx_mapping,
            rows.query_start_loc,
            positions,
            torch.tensor([table.data_ptr() for table in tables], dtype=torch.uint64),
            torch.tensor(strides),
            torch.tensor(block_sizes, dtype=torch.int32),
            torch.tensor(enabled),
            torch.tensor([False, False]),
            torch.full((2, rows.num_tokens + 5), 7),
            rows.num_tokens + 5,
            0,
            CP_SIZE=1,
            CP_INTERLEAVE=1,
            PAD_ID=-1,
            TRITON_BLOCK_SIZE=1024,
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_and_sequence_lengths(seed):
    rows = Rows(seed)
    assert_same(
        f"{BATCH}:_prepare_pos_seq_lens_kernel",
        (rows.num_reqs + 1,),
        torch.full((rows.num_tokens + 3,), -7),
        torch.full((MAX_NUM_REQS,), -7, dtype=torch.int32),
        rows.idx_mapping,
        rows.query_start_loc,
        rows.num_computed,
        MAX_NUM_REQS,
        BLOCK_SIZE=1024,
    )


@pytest.mark.parametrize("num_new", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_sampled_and_draft_tokens(seed, num_new):
    rows = Rows(seed)
    assert_same(
        f"{BATCH}:_combine_sampled_and_draft_tokens_kernel",
        (rows.num_reqs,),
        rows.draw(0, 50, (rows.num_tokens + 2,)).int(),
        rows.idx_mapping,
        rows.draw(100, 200, (MAX_NUM_REQS, 1)),
        rows.query_start_loc,
        rows.seq_lens,
        rows.prefill_lens,
        rows.draw(200, 300, (MAX_NUM_REQS, rows.num_drafts + 1 - num_new)),
        rows.num_drafts + 1 - num_new,
        rows.cu_num_logits,
        torch.full((rows.total_logits,), -7),
        BLOCK_SIZE=triton.next_power_of_2(rows.num_drafts + 1),
        NUM_NEW_SAMPLED_TOKENS=num_new,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_expanded_rows(seed):
    rows = Rows(seed)
    assert_same(
        f"{BATCH}:_expand_idx_mapping_kernel",
        (rows.num_reqs,),
        rows.idx_mapping,
        torch.full((rows.total_logits,), -7, dtype=torch.int32),
        torch.full((rows.total_logits,), -7, dtype=torch.int32),
        rows.cu_num_logits,
        BLOCK_SIZE=triton.next_power_of_2(rows.num_drafts + 1),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_of_sampled_and_rejected_tokens(seed):
    rows = Rows(seed)
    assert_same(
        f"{BATCH}:_get_num_sampled_and_rejected_kernel",
        (rows.num_reqs,),
        (rows.num_logits - 1).clamp(min=1),
        torch.full((rows.num_reqs,), -7, dtype=torch.int32),
        rows.seq_lens,
        rows.cu_num_logits,
        rows.idx_mapping,
        rows.prefill_lens,
    )


@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_sampled_is_appended(seed, with_counts, with_queries):
    rows = Rows(seed)
    rows.idx_mapping[1:][rows.draw(0, 4, (rows.num_reqs - 1,)) == 0] = -1
    num_sampled = torch.minimum(rows.num_logits, rows.draw(0, 4, (rows.num_reqs,))).int()
    num_sampled[0] = 1
    counts = torch.zeros(MAX_NUM_REQS, 6, dtype=torch.int32) if with_counts else None
    assert_same(
        f"{BATCH}:_post_update_kernel",
        (rows.num_reqs,),
        rows.idx_mapping,
        rows.num_computed,
        torch.full((MAX_NUM_REQS, 1), -7),
        counts,
        6 if with_counts else 0,
        rows.draw(0, 6, (rows.num_reqs, rows.num_drafts + 1)),
        rows.num_drafts + 1,
        num_sampled,
        rows.num_logits - num_sampled,
        rows.query_start_loc if with_queries else None,
        torch.zeros(MAX_NUM_REQS, 40, dtype=torch.int32),
        40,
        rows.draw(1, 30, (MAX_NUM_REQS,)).int(),
        num_warps=1,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_inputs_of_the_first_draft_pass(seed):
    rows = Rows(seed)
    idx_mapping = rows.permutation()
    idx_mapping[: rows.num_reqs][rows.draw(0, 4, (rows.num_reqs,)) == 0] = -1
    seq_lens = rows.seq_lens.clone()
    seq_lens[0] = 20  # The model's last position is 19.
    num_sampled = rows.draw(0, 3, (rows.num_reqs,)).int()
    assert_same(
        "vllm_layerskip.worker.draft_inputs:_prepare_first_pass_kernel",
        (1,),
        idx_mapping,
        torch.full((MAX_NUM_REQS + 3,), -7, dtype=torch.int32),
        torch.full((MAX_NUM_REQS + 3,), -7),
        torch.full((MAX_NUM_REQS + 3,), -7, dtype=torch.int32),
        torch.zeros(MAX_NUM_REQS + 4, dtype=torch.int32),
        seq_lens,
        num_sampled,
        rows.draw(0, 2, (rows.num_reqs,)).int(),
        rows.draw(100, 200, (MAX_NUM_REQS, 1)),
        rows.num_reqs,
        MAX_NUM_REQS,
        20,
        BLOCK_SIZE=16,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_inputs_of_the_next_draft_pass(seed):
    rows = Rows(seed)
    idx_mapping = rows.permutation().where(rows.draw(0, 3, (MAX_NUM_REQS,)) > 0, -1)
    positions = rows.draw(0, 5, (MAX_NUM_REQS,))
    positions[0] = 4  # The last but one.
    results = []
    for kernel in kernels("vllm_layerskip.worker.draft_inputs:_advance_kernel"):
        buffers = [idx_mapping.clone(), torch.zeros(12).int(), positions.clone()]
        buffers += [positions.int() + 1, torch.full((MAX_NUM_REQS, 3), -7)]
        kernel[(1,)](
            *buffers[:4],
            100 + torch.arange(rows.num_reqs),
            buffers[4][:, 1],
            3,
            rows.num_reqs,
            5,
            BLOCK_SIZE=triton.next_power_of_2(rows.num_reqs),
        )
        results.append(buffers)
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)
    assert not torch.equal(results[0][4], torch.full((MAX_NUM_REQS, 3), -7))


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_plan_of_a_verify_step(seed, num_groups):
    rows = Rows(seed)
    num_drafts, num_padded = 1 + seed % 3, rows.num_reqs + seed % 2
    num_tokens = num_padded * (num_drafts + 1)
    assert_same(
        "vllm_layerskip.worker.model_state:_prepare_plan_kernel",
        (1,),
        torch.full((MAX_NUM_REQS,), -7),
        torch.full((MAX_NUM_REQS + 1,), -7, dtype=torch.int32),
        torch.full((num_groups, MAX_NUM_REQS), -7),
        MAX_NUM_REQS,
        rows.idx_mapping,
        rows.draw(0, 90, (num_groups, num_tokens)),
        num_tokens,
        0 if seed == 5 else rows.num_reqs,  # No request while a graph is captured.
        rows.num_reqs,
        num_padded,
        num_drafts,
        NUM_KV_CACHE_GROUPS=num_groups,
        BLOCK_SIZE=16,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens_per_req", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_exit_states_of_a_draft_pass(seed, num_tokens_per_req, dtype):
    rows = Rows(seed)
    hidden_size, num_steps = 5, min(num_tokens_per_req, 1 + seed % 2)
    rows.idx_mapping[1:][rows.draw(0, 3, (rows.num_reqs - 1,)) == 0] = -1
    # Views of larger buffers, as in a step.
    num_tokens = rows.num_reqs * num_tokens_per_req + seed
    given = torch.randn(2, num_tokens, hidden_size + 3, generator=rows.generator).to(dtype)
    results = []
    for kernel in kernels("vllm_layerskip.worker.exit_states:_store_kernel"):
        states = torch.full((2, MAX_NUM_REQS, 4, hidden_size), 7, dtype=dtype)
        kernel[(rows.num_reqs, num_steps)](
            states[0, :, 1 : 1 + num_steps],
            states[1, :, 1 : 1 + num_steps],
            states.stride(1),
            states.stride(2),
            rows.idx_mapping,
            given[0, :, :hidden_size],
            hidden_size + 3,
            given[1, :, :hidden_size],
            hidden_size + 3,
            num_tokens_per_req,
            hidden_size,
            BLOCK_SIZE=8,
        )
        results.append(states)
    assert torch.equal(*results)
    assert not (results[0] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_exit_states_of_a_verify_step(seed, dtype):
    rows = Rows(seed)
    hidden_size, num_drafts = 5, 1 + seed % 3
    rows.idx_mapping[1:][rows.draw(0, 3, (rows.num_reqs - 1,)) == 0] = -1
    states = torch.randn(2, MAX_NUM_REQS, 3, hidden_size, generator=rows.generator).to(dtype)
    last = torch.randn(2, rows.num_reqs, hidden_size, generator=rows.generator).to(dtype)
    num_tokens = rows.num_reqs * (num_drafts + 1) + seed  # Some of them padding.
    assert_same(
        "vllm_layerskip.worker.exit_states:_gather_kernel",
        (num_tokens,),
        torch.full((num_tokens, hidden_size), 7, dtype=dtype),
        torch.full((num_tokens, hidden_size), 7, dtype=dtype),
        hidden_size,
        states[0],
        states[1],
        states.stride(1),
        states.stride(2),
        rows.idx_mapping,
        rows.num_reqs,
        last[0],
        hidden_size,
        last[1],
        hidden_size,
        num_drafts,
        BLOCK_SIZE=8,
    )


@pytest.mark.parametrize("vocab_size", [7, 9000])
def test_temperature(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    assert_same(
        f"{GUMBEL}:_temperature_kernel",
        (6, triton.cdiv(vocab_size, 8192)),
        torch.randn(6, vocab_size, generator=generator),
        vocab_size,
        torch.tensor([2, 0, 1, 2, 3, 0], dtype=torch.int32),
        torch.tensor([0.0, 1.0, 0.7, 1.3]),
        vocab_size,
        BLOCK_SIZE=8192,
    )


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
    expected, actual = (
        draw(kernel, monkeypatch, **arguments)
        for kernel in kernels(f"{GUMBEL}:_gumbel_sample_kernel")
    )
    assert actual.tolist() == expected.tolist()
    assert len(set(actual.tolist())) > 3


@pytest.mark.parametrize("per_token_column", [False, True])
def test_gumbel_caches_the_same_rows(monkeypatch, per_token_column):
    num_tokens, max_num_reqs, vocab_size = 4, 5, 11
    columns = torch.tensor([0, 2, 1, 0]) if per_token_column else torch.tensor(1)
    caches = []
    for kernel in kernels(f"{GUMBEL}:_gumbel_sample_kernel"):
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


@triton.jit
def _rand_kernel(out_ptr, seed_ptr, offset_ptr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, tl.rand(tl.load(seed_ptr + row), tl.load(offset_ptr + row)))


def test_philox_is_tritons():
    seeds = torch.tensor([0, 1, -5, 2**40 + 3, 2**62, 77, -(2**63)])
    offsets = torch.tensor([0, 7, 2**31, 2**32 + 1, 5000, 2**20, 3])
    expected = torch.empty(len(seeds))
    _rand_kernel[(len(seeds),)](expected, seeds, offsets)
    assert torch.equal(philox_uniform(seeds, offsets), expected)
    assert expected.unique().numel() == len(seeds)


@pytest.mark.parametrize("seed", SEEDS)
def test_drafts_are_gathered(seed):
    rows = Rows(seed)
    assert_same(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:_gather_draft_sampled_kernel",
        (1,),
        torch.full((rows.total_logits,), -7, dtype=torch.int32),
        torch.full((rows.total_logits,), -7),
        rows.draw(0, 50, (rows.num_tokens,)).int(),
        rows.draw(0, 30, (rows.num_tokens,)),
        rows.draw(0, rows.num_tokens, (rows.total_logits,)),
        rows.expanded,
        rows.local_pos,
        rows.prefill_lens,
        rows.total_logits,
        BLOCK_SIZE=1024,
    )


@pytest.fixture
def interpreter_log1p(monkeypatch):
    """The function of libdevice that the interpreter lacks."""
    libdevice = SimpleNamespace(log1p=lambda value: tl.log(1.0 + value))
    monkeypatch.setattr(rejection_sampler_utils, "tldevice", libdevice)


VERIFICATION = (
    "_compute_local_logits_stats_kernel",
    "_rejection_kernel",
    "_resample_kernel",
    "_insert_resampled_kernel",
)


MODES = ("one-hot", "draft-logits", "synthetic", "block", "block-one-hot")


@pytest.mark.parametrize(
    ("mode", "replaced", "vocab_size", "use_fp64"),
    [
        # Each kernel alone, between interpreted ones; then all of them, over several blocks.
        *((mode, (name,), 9, False) for mode in MODES for name in VERIFICATION),
        *((mode, VERIFICATION, 9, True) for mode in MODES),
        *((mode, VERIFICATION, 9000, False) for mode in MODES),
    ],
)
def test_verification_emits_the_kernels_tokens(
    monkeypatch, interpreter_log1p, mode, replaced, vocab_size, use_fp64
):
    num_emitted = set()
    for seed in range(4 if vocab_size < 100 else 1):
        arguments = verification_arguments(Rows(seed), vocab_size, mode)
        emitted = []
        for index in range(2):
            for name in VERIFICATION:
                kernel = kernels(f"{REJECTION}:{name}")[index if name in replaced else 0]
                monkeypatch.setattr(rejection_sampler_utils, name, kernel)
            sampled, num_sampled = rejection_sampler_utils.rejection_sample(
                **arguments, use_fp64=use_fp64
            )
            is_emitted = torch.arange(sampled.shape[1]) < num_sampled[:, None]
            emitted.append(torch.where(is_emitted, sampled, -1).tolist())
        assert emitted[0] == emitted[1]
        num_emitted |= {sum(token >= 0 for token in row) for row in emitted[0]}
    # Drafts are accepted and rejected at every step.
    assert num_emitted >= ({1, 2, 3, 4} if vocab_size < 100 else {1, 4})


def verification_arguments(rows, vocab_size, mode):
    """Greedy and random rows with 0 to 3 drafts; most drafts are worth accepting."""
    num_logits = torch.tensor([4, 4, 1, 3, 4, 2, 4, 4])
    idx_mapping = rows.permutation()[: len(num_logits)]
    target = torch.randn(int(num_logits.sum()), vocab_size, generator=rows.generator) * 2
    drafts = target.argmax(-1).roll(1)
    chance = rows.draw(0, 12, drafts.shape)
    drafts = torch.where(chance < 2, rows.draw(0, vocab_size, drafts.shape), drafts)
    drafts = torch.where(chance == 2, -1, drafts)  # The grammar dropped it.
    # Drafts are drawn from something like the target.
    draft_logits = torch.randn(MAX_NUM_REQS, 3, vocab_size, generator=rows.generator)
    starts = rows.cumulated(num_logits)[:-1].long()
    for row, (start, length) in enumerate(zip(starts.tolist(), num_logits.tolist(), strict=True)):
        draft_logits[idx_mapping[row], : length - 1] += target[start : start + length - 1]
    return {
        "target_logits": target,
        "draft_logits": draft_logits if mode in ("draft-logits", "block") else None,
        "draft_sampled": drafts,
        "cu_num_logits": rows.cumulated(num_logits),
        "pos": torch.arange(len(target)),
        "idx_mapping": idx_mapping,
        "expanded_idx_mapping": idx_mapping.repeat_interleave(num_logits),
        "expanded_local_pos": torch.cat([torch.arange(n) for n in num_logits.tolist()]).int(),
        "temperature": torch.tensor([0.0, 0.8, 0.8, 0.0, 1.3, 0.8, 0.0, 0.8, 1.0]),
        "seed": torch.arange(MAX_NUM_REQS) * 2**33,
        "num_speculative_steps": 3,
        "synthetic_conditional_rates": (
            torch.tensor([0.9, 0.5, 0.5]) if mode == "synthetic" else None
        ),
        "use_block_verification": mode.startswith("block"),
    }


@pytest.mark.parametrize("with_drafts", [False, True])
def test_normalisers_of_the_logits(with_drafts):
    generator = torch.Generator().manual_seed(0)
    num_logits, vocab_size, num_drafts = 8, 20000, 3
    num_blocks = triton.cdiv(vocab_size, 8192)
    expanded = torch.tensor([4, 4, 4, 4, 2, 2, 0, 0], dtype=torch.int32)
    local_pos = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1], dtype=torch.int32)
    temperature = torch.tensor([0.0, 9.0, 0.7, 9.0, 1.3])
    target = torch.randn(num_logits, vocab_size, generator=generator) * 4
    draft = torch.randn(5, num_drafts, vocab_size, generator=generator) if with_drafts else None
    blocks = torch.zeros(num_logits, num_blocks)
    expected, actual = run_both(
        f"{REJECTION}:_compute_local_logits_stats_kernel",
        (num_logits, num_blocks),
        blocks.long(),
        num_blocks,
        *(blocks, num_blocks) * 4,
        target,
        vocab_size,
        draft,
        draft.stride(0) if with_drafts else 0,
        draft.stride(1) if with_drafts else 0,
        expanded,
        local_pos,
        temperature,
        vocab_size,
        num_drafts,
        BLOCK_SIZE=8192,
        HAS_DRAFT_LOGITS=with_drafts,
    )

    def logsumexp(largest, total):
        return (total.log() + largest).logsumexp(1)

    random = torch.tensor([True, True, True, False, True, True, False, False])
    greedy = torch.tensor([False] * 6 + [True] * 2)
    winner = [
        side[0].gather(1, side[1].argmax(1, keepdim=True))[greedy] for side in (expected, actual)
    ]
    assert winner[0].tolist() == winner[1].tolist()
    for first in (1, 3) if with_drafts else (1,):
        torch.testing.assert_close(
            logsumexp(actual[first], actual[first + 1])[random],
            logsumexp(expected[first], expected[first + 1])[random],
            atol=1e-5,
            rtol=1e-5,
        )


def test_kernels_of_another_vllm_are_left_alone(monkeypatch):
    """0.33 keeps their names and changes what they do (FLy verification, bonus rows)."""
    registered = {}
    monkeypatch.setattr(dispatcher, "_registry", {})
    monkeypatch.setattr(dispatcher, "register_kernels", registered.update)
    for release, foreign in (("0.32.1", True), ("dev", True), ("0.33.0", False)):
        registered.clear()
        monkeypatch.setattr(version, "vllm_version", lambda release=release: release)
        cpu_kernels.register()
        assert any(name.startswith("vllm.") for name in registered) == foreign
        assert any(name.startswith("vllm_layerskip.") for name in registered)
