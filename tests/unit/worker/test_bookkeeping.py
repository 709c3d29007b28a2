# SPDX-License-Identifier: Apache-2.0
"""Drafting and verify planning against a plain Python model of what they must do.

Requests come, are prefilled in chunks, draft, are verified, preempted, resumed, aborted and
end, in any order that hypothesis finds. The bookkeeping is the real one (draft inputs, slot
mappings, validity, verify plans, exit states); the network is replaced by one whose exit state
and K/V of a token *are* that token and its position, so that whatever is read from a wrong
slot, row, step or position shows. The model knows what every page and every exit state has to
hold.

Catches what a wrong position, a stale exit state, an overwritten neighbour or a plan for the
wrong rows would do to outputs, without an engine.
"""

import contextlib
import dataclasses
import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_as_test
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm_layerskip.metrics.step_counts import StepCounts
from vllm_layerskip.models import stages
from vllm_layerskip.models.stages import LayerSkipForCausalLM
from vllm_layerskip.worker import model_state as model_state_module
from vllm_layerskip.worker import speculator as speculator_module
from vllm_layerskip.worker.exit_states import ExitStates
from vllm_layerskip.worker.model_state import LayerSkipModelState
from vllm_layerskip.worker.speculator import LayerSkipSpeculator

DEVICE = torch.device("cpu")
MAX_NUM_REQS, MAX_MODEL_LEN, BLOCK_SIZE, K = 3, 14, 4, 3
MAX_BLOCKS = -(-(MAX_MODEL_LEN + K) // BLOCK_SIZE)
MAX_NUM_TOKENS = MAX_NUM_REQS * MAX_MODEL_LEN
PAD = -1
TEST_SETTINGS = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@dataclasses.dataclass
class Request:
    """What is true of a request, whoever computes it."""

    tokens: list[int]
    slot: int
    prefill_len: int
    num_computed: int = 0
    drafts: list[int] = dataclasses.field(default_factory=list)
    """Drafted after ``tokens`` by the last propose; those of them that have a position."""
    runs_ahead: int = 0
    """The host's ``num_computed`` is too high by this until it hears of rejections."""
    num_valid: int = 0
    """Passes of the last propose, 0 for a new owner of the slot."""

    @property
    def in_prefill(self) -> bool:
        return self.num_computed < self.prefill_len


class Network:
    """Early layers whose exit state of a token is the token and its position."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int]] = {}
        """(position, token) whose K/V a slot holds."""

    def run_early_stage(self, input_ids, positions, slots):
        assert len(slots) == len(input_ids) == len(positions)
        for slot, position, token in zip(
            slots.tolist(), positions.tolist(), input_ids.tolist(), strict=True
        ):
            if slot != PAD:
                self.pages[slot] = position, token
        state = torch.stack([input_ids.float(), positions.float()], dim=1)
        return state, -state


class PagedTables(BlockTables):
    """vLLM's slot mappings, without the buffers that want pinned memory."""

    def __init__(self) -> None:
        self.block_sizes, self.num_kv_cache_groups, self.device = [BLOCK_SIZE], 1, DEVICE
        self.cp_size, self.cp_rank, self.cp_interleave = 1, 0, 1
        self._slot_mapping_enabled = [True]
        self.dcp_sharded = torch.tensor([True])
        self.blocks = torch.zeros(MAX_NUM_REQS, MAX_BLOCKS, dtype=torch.int32)
        self.block_tables = [SimpleNamespace(gpu=self.blocks)]
        self.input_block_tables = [self.blocks.clone()]
        self.slot_mappings = torch.zeros(1, MAX_NUM_TOKENS, dtype=torch.int64)
        self.init_block_table_layout_tensors()


class Speculator(LayerSkipSpeculator):
    """The real one, without vLLM's set-up, around ``Network``."""

    def __init__(self, network, block_tables, draft_state) -> None:
        self.network, self.block_tables, self.draft_state = network, block_tables, draft_state
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN), lora_config=None
        )
        self.num_speculative_steps = K
        self.input_buffers = InputBuffers(MAX_NUM_REQS, MAX_NUM_TOKENS, DEVICE)
        self.idx_mapping = torch.zeros(MAX_NUM_REQS, dtype=torch.int64)
        self.temperature = torch.zeros(MAX_NUM_REQS)
        self.seeds = torch.zeros(MAX_NUM_REQS, dtype=torch.int64)
        self.draft_tokens = torch.zeros(MAX_NUM_REQS, K, dtype=torch.int64)
        self.draft_steps = torch.arange(K)
        self.draft_head = self.draft_graphs = self.draft_logits = self.kv_cache_config = None
        self.model = SimpleNamespace(
            run_early_stage=self._run_early_stage, exit_norm=lambda hidden, residual: hidden
        )
        self.exit_model, self.draft_twin = self.model, None
        self.speculative_config = SimpleNamespace(reuse_exit_states=True)
        self.passes: list[list[tuple[int, int, int, int] | None]] = []
        """For each pass and row: (position, slot, length, token); None for a row that is out."""

    def _build_uniform_attn_metadata(self, **kwargs):
        return kwargs

    def _run_early_stage(self, input_ids, positions):
        slots = self.block_tables.slot_mappings[0, : len(positions)]
        seq_lens = self.input_buffers.seq_lens[: len(positions)]
        rows = zip(
            positions.tolist(),
            slots.tolist(),
            seq_lens.tolist(),
            input_ids.tolist(),
            self.idx_mapping[: len(positions)].tolist(),
            strict=True,
        )
        self.passes.append([None if row[-1] == -1 else row[:-1] for row in rows])
        # A row that is out may not write, whatever stands in its other fields.
        assert all(slots[row] == PAD for row, seen in enumerate(self.passes[-1]) if seen is None)
        assert bool((positions < MAX_MODEL_LEN).all())
        return self.network.run_early_stage(input_ids, positions, slots)

    def sample_draft(self, hidden_states, positions, idx_mapping, *args):
        # Rows that are out are skipped by sampling: what stands there is undefined.
        return torch.tensor(
            [-12345 if slot == -1 else next(self.token_ids) for slot in idx_mapping.tolist()]
        )


class ModelState(LayerSkipModelState):
    """The real one, without vLLM's set-up."""

    def __init__(self, draft_state) -> None:
        self.draft_state, self.step_counts = draft_state, StepCounts()
        self.config = SimpleNamespace(reuse_exit_states=True)
        self.model_config = SimpleNamespace(max_model_len=MAX_MODEL_LEN)
        self.early_attn_groups = []
        self.model, self._num_weight_changes = SimpleNamespace(num_weight_changes=1), 1
        self.idx_mapping = torch.full((MAX_NUM_REQS,), -7, dtype=torch.int64)
        self.query_start_loc = torch.zeros(MAX_NUM_REQS + 1, dtype=torch.int32)
        self.slot_mappings = torch.full((1, MAX_NUM_REQS), -7, dtype=torch.int64)


@dataclasses.dataclass
class Context:
    attn_metadata: object = None
    slot_mapping: object = None
    cudagraph_runtime_mode: object = None
    batch_descriptor: object = None


@contextlib.contextmanager
def without_vllm():
    """Replace what the tested functions call and what would need a whole vLLM."""
    with contextlib.ExitStack() as patches:

        def replace(owner, name, value):
            patches.enter_context(mock.patch.object(owner, name, value))

        context = [Context()]

        @contextlib.contextmanager
        def override(new):
            context.append(new)
            yield
            context.pop()

        def nothing(*args, **kwargs):
            return contextlib.nullcontext()

        replace(model_state_module.DefaultModelState, "prepare_attn", lambda *a, **k: {})
        replace(model_state_module.DefaultModelState, "add_request", lambda *a: None)
        replace(model_state_module, "build_attn_metadata", lambda **kwargs: kwargs)
        replace(model_state_module, "build_slot_mappings_by_layer", lambda slots, _: slots)
        replace(speculator_module, "build_slot_mappings_by_layer", lambda slots, _: slots)
        replace(speculator_module, "set_forward_context", nothing)
        replace(stages, "get_forward_context", lambda: context[-1])
        replace(stages, "override_forward_context", override)
        yield context


class Bookkeeping(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patches = contextlib.ExitStack()
        self.context = self.patches.enter_context(without_vllm())
        self.network = Network()
        self.block_tables = PagedTables()
        self.exit_states = ExitStates(MAX_NUM_REQS, K, 2, torch.float32, DEVICE)
        self.exit_states.states.fill_(-99)
        self.draft_state = SimpleNamespace(exit_states=self.exit_states, lora_rows=None)
        self.speculator = Speculator(self.network, self.block_tables, self.draft_state)
        self.model_state = ModelState(self.draft_state)
        # Each token has an id of its own, which tells whose token it is, and which draw.
        self.token_ids = self.speculator.token_ids = itertools.count(100)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.free_blocks = list(range(1, 1 + MAX_NUM_REQS * MAX_BLOCKS))
        self.last_sampled = torch.zeros(MAX_NUM_REQS, 1, dtype=torch.int64)

    def teardown(self) -> None:
        self.patches.close()

    # Requests come and go.

    def admit(self, request: Request) -> None:
        request.num_valid = 0
        taken = {other.slot for other in self.running}
        request.slot = min(set(range(MAX_NUM_REQS)) - taken)
        blocks, self.free_blocks = self.free_blocks[:MAX_BLOCKS], self.free_blocks[MAX_BLOCKS:]
        self.block_tables.blocks[request.slot] = torch.tensor(blocks)
        self.model_state.add_request(request.slot, SimpleNamespace(lora_request=None))
        self.running.append(request)

    def leave(self, request: Request) -> None:
        self.running.remove(request)
        # Taken again soon: the next owner must not find anything of this one's.
        blocks = self.block_tables.blocks[request.slot].tolist()
        self.free_blocks = blocks + self.free_blocks

    def slot_of(self, request: Request, position: int) -> int:
        block = int(self.block_tables.blocks[request.slot, position // BLOCK_SIZE])
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    @precondition(lambda self: len(self.running) < MAX_NUM_REQS)
    @rule(prompt_len=st.integers(1, MAX_MODEL_LEN - 1), cached=st.booleans())
    def add(self, prompt_len, cached):
        tokens = [next(self.token_ids) for _ in range(prompt_len)]
        request = Request(tokens, slot=-1, prefill_len=prompt_len)
        self.admit(request)
        if cached:  # All but the last token, which is computed in any case.
            self.fill_from_cache(request, prompt_len - 1)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data):
        request = data.draw(st.sampled_from(self.running))
        self.leave(request)
        request.drafts, request.num_computed, request.runs_ahead = [], 0, 0
        self.waiting.append(request)

    @precondition(lambda self: self.waiting and len(self.running) < MAX_NUM_REQS)
    @rule(cached=st.booleans())
    def resume(self, cached):
        request = self.waiting.pop()
        # What it generated is part of what is prefilled now.
        request.prefill_len = len(request.tokens)
        self.admit(request)
        if cached:
            self.fill_from_cache(request, request.prefill_len - 1)

    def fill_from_cache(self, request: Request, num_tokens: int) -> None:
        for position in range(num_tokens):
            page = position, request.tokens[position]
            self.network.pages[self.slot_of(request, position)] = page
        request.num_computed = num_tokens

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data):
        self.leave(data.draw(st.sampled_from(self.running)))

    # Steps of the engine.

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        schedule_of_k=st.lists(st.sampled_from([K, K, K, K - 1, 1, 0]), min_size=1, max_size=4),
    )
    def steps(self, data, schedule_of_k):
        for num_speculative_tokens in schedule_of_k:
            if self.running:
                self.step(data, num_speculative_tokens)

    def step(self, data, num_speculative_tokens):
        requests = self.schedule(data)
        drafts, chunks, inputs = self.inputs_of(data, requests)
        batch = self.batch_of(requests, drafts, inputs)
        self.verify(requests, drafts, batch)
        num_sampled, num_rejected = self.sample(data, requests, drafts, chunks)
        self.draft(requests, batch, num_sampled, num_rejected, num_speculative_tokens)
        for request in list(requests):
            if len(request.tokens) >= MAX_MODEL_LEN:
                self.leave(request)

    def schedule(self, data) -> list[Request]:
        """Most steps take every running request; a token budget may leave some out."""
        if data.draw(st.integers(0, 4)):
            return list(self.running)
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.running))), unique=True))
        return [self.running[index] for index in chosen] or list(self.running)

    def inputs_of(self, data, requests):
        drafts, chunks, inputs = [], [], []
        for request in requests:
            start, placeholders = request.num_computed, []
            if request.in_prefill:
                left = request.prefill_len - start
                chunk = left if data.draw(st.booleans()) else data.draw(st.integers(1, left))
                verified = []
                if left == 1 and data.draw(st.booleans()):
                    # vLLM pads a cached prompt's last token to the length of a decode.
                    placeholders = [0] * min(K, MAX_MODEL_LEN - 1 - start - 1)
            else:
                chunk = 1
                verified = list(request.drafts)
                if data.draw(st.integers(0, 3)) == 0:  # A budget, a grammar or K = 0.
                    verified = verified[: data.draw(st.integers(0, len(verified)))]
                # vLLM keeps inputs in front of the last position.
                verified = verified[: max(0, MAX_MODEL_LEN - 1 - start - 1)]
            drafts.append(verified or placeholders)
            chunks.append(chunk)
            inputs.append(request.tokens[start : start + chunk] + (verified or placeholders))
        return drafts, chunks, inputs

    def batch_of(self, requests, drafts, inputs):
        num_scheduled = np.array([len(tokens) for tokens in inputs], dtype=np.int32)
        starts = np.array([request.num_computed for request in requests], dtype=np.int32)
        ahead = np.array([request.runs_ahead for request in requests], dtype=np.int32)
        idx_mapping_np = np.array([request.slot for request in requests], dtype=np.int32)
        num_drafts = np.array([len(row) for row in drafts], dtype=np.int32)
        prefill_len = np.array([request.prefill_len for request in requests], dtype=np.int32)
        in_prefill = np.array([request.in_prefill for request in requests])
        num_tokens = int(num_scheduled.sum())
        self.query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
        self.query_start_loc[1:] = torch.from_numpy(num_scheduled).cumsum(0)
        positions = [
            start + offset
            for start, row in zip(starts.tolist(), inputs, strict=True)
            for offset in range(len(row))
        ]
        return SimpleNamespace(
            req_ids=[str(request.slot) for request in requests],
            num_reqs=len(requests),
            num_reqs_after_padding=len(requests),
            num_tokens=num_tokens,
            num_tokens_after_padding=num_tokens,
            idx_mapping=torch.from_numpy(idx_mapping_np),
            idx_mapping_np=idx_mapping_np,
            num_scheduled_tokens=num_scheduled,
            num_draft_tokens_per_req=num_drafts if num_drafts.any() else None,
            # On the host, decodes may run ahead of the device.
            num_computed_tokens_np=starts + ahead,
            prefill_len_np=prefill_len,
            is_prefilling_np=in_prefill,
            has_prefill=bool(in_prefill.any()),
            seq_lens=torch.from_numpy(starts + num_scheduled),
            seq_lens_cpu_upper_bound=torch.from_numpy(starts + ahead + num_scheduled),
            positions=torch.tensor(positions, dtype=torch.int64),
            input_ids=torch.tensor([t for row in inputs for t in row], dtype=torch.int64),
        )

    def verify(self, requests, drafts, batch):
        slots = self.block_tables.compute_slot_mappings(
            batch.idx_mapping, self.query_start_loc, batch.positions, batch.num_tokens
        ).clone()
        metadata = self.model_state.prepare_attn(
            batch, CUDAGraphMode.NONE, (), slots, [], SimpleNamespace()
        )
        plan = getattr(metadata, "plan", None)
        assert (plan is not None) == self.may_reuse(requests, drafts)
        expected = torch.stack([batch.input_ids.float(), batch.positions.float()], dim=1)
        if plan is None:
            self.network.run_early_stage(batch.input_ids, batch.positions, slots[0])
            return

        num_drafts = len(drafts[0])
        last = [request.num_computed + num_drafts for request in requests]
        assert plan.num_speculative_tokens == num_drafts
        assert plan.idx_mapping.tolist() == [request.slot for request in requests]
        assert plan.slot_mappings[0].tolist() == list(map(self.slot_of, requests, last))
        for name in ("query_start_loc_gpu", "query_start_loc_cpu"):
            assert plan.attn_metadata[name].tolist() == list(range(len(requests) + 1))
        # The last draft is the token at the end of what its row attends to.
        assert plan.attn_metadata["seq_lens"].tolist() == [position + 1 for position in last]

        def run_early_stage(input_ids, positions):
            assert self.context[-1].slot_mapping is plan.slot_mappings
            assert self.context[-1].attn_metadata is plan.attn_metadata
            return self.network.run_early_stage(input_ids, positions, plan.slot_mappings[0])

        model = SimpleNamespace(draft_state=self.draft_state, run_early_stage=run_early_stage)
        hidden_states, residual = LayerSkipForCausalLM._reuse_exit_states(
            model, batch.input_ids, batch.positions, plan
        )
        # What the early stage would have computed for every token of the batch.
        assert torch.equal(hidden_states, expected)
        assert torch.equal(residual, -expected)

    def may_reuse(self, requests, drafts) -> bool:
        """Whether the batch has decodes alone, with equally many drafts of their last propose."""
        return (
            not any(request.in_prefill for request in requests)
            and len({len(row) for row in drafts}) == 1
            and len(drafts[0]) > 0
        )

    def sample(self, data, requests, drafts, chunks):
        """Accept some drafts of each row and draw one token more."""
        num_sampled, num_rejected = [], []
        for request, row, chunk in zip(requests, drafts, chunks, strict=True):
            ends_prefill = request.num_computed + chunk >= request.prefill_len
            if request.in_prefill and not ends_prefill:
                request.num_computed += chunk
                num_sampled.append(0)
                num_rejected.append(0)
                continue
            accepted = 0 if request.in_prefill else data.draw(st.integers(0, len(row)))
            request.tokens += [*row[:accepted], next(self.token_ids)]
            request.num_computed += chunk + accepted
            num_sampled.append(1 + accepted)
            num_rejected.append(len(row) - accepted)
            # With asynchronous scheduling the host hears of it a step later.
            request.runs_ahead = len(row) - accepted if data.draw(st.booleans()) else 0
            self.last_sampled[request.slot] = request.tokens[-1]
        return torch.tensor(num_sampled), torch.tensor(num_rejected)

    def draft(self, requests, batch, num_sampled, num_rejected, num_speculative_tokens):
        self.speculator.passes.clear()
        drafted = self.speculator.propose(
            batch,
            {},
            {},
            torch.empty(0),
            None,
            num_sampled.int(),
            num_rejected.int(),
            self.last_sampled,
            torch.empty(0),
            torch.zeros(MAX_NUM_REQS),
            torch.zeros(MAX_NUM_REQS, dtype=torch.int64),
            num_speculative_tokens=num_speculative_tokens,
        )
        assert len(self.speculator.passes) == num_speculative_tokens
        for row, request in enumerate(requests):
            drafts = drafted[row, :num_speculative_tokens].tolist()
            samples = bool(num_sampled[row] > 0)
            request.num_valid = num_speculative_tokens if samples else 0
            tokens = [request.tokens[-1], *drafts]
            num_passes = 0
            for step, rows in enumerate(self.speculator.passes):
                # A pass takes the token that was sampled last, where that token belongs.
                position = len(request.tokens) - 1 + step
                if not samples or position >= MAX_MODEL_LEN:
                    assert rows[row] is None
                    continue
                num_passes += 1
                slot = self.slot_of(request, position)
                assert rows[row] == (position, slot, position + 1, tokens[step])
            request.drafts = drafts[:num_passes] if samples else []

    # What must hold between steps.

    @invariant()
    def every_computed_token_is_in_its_page(self):
        for request in self.running:
            for position in range(request.num_computed):
                page = self.network.pages[self.slot_of(request, position)]
                assert page == (position, request.tokens[position])

    @invariant()
    def validity_is_that_of_the_slots_owner(self):
        for request in self.running:
            assert self.exit_states.num_valid_np[request.slot] == request.num_valid


def test_bookkeeping_follows_the_model():
    run_as_test(Bookkeeping, settings=TEST_SETTINGS)


def _wrap(owner, name, change):
    """``owner.name`` with other arguments: ``change(original, *args, **kwargs)``."""
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def _with(**attributes):
    """``change`` for methods that read a batch: they see these values in it."""

    def change(original, self, batch, *args, **kwargs):
        changed = {name: value(batch) for name, value in attributes.items()}
        return original(self, SimpleNamespace(**{**vars(batch), **changed}), *args, **kwargs)

    return change


def _advance_by_two(original, buffers, idx_mapping, sampled, drafts, num_reqs, max_model_len):
    original(buffers, idx_mapping, sampled, drafts, num_reqs, max_model_len)
    buffers.positions[:num_reqs] += (idx_mapping[:num_reqs] >= 0).long()


def _keep_lengths(original, buffers, *args):
    before = buffers.seq_lens.clone()
    original(buffers, *args)
    buffers.seq_lens.copy_(before)


def _forget_rejections(original, buffers, idx_mapping, lens, sampled, rejected, *args):
    original(buffers, idx_mapping, lens, sampled, torch.zeros_like(rejected), *args)


def _never_out(original, buffers, idx_mapping, sampled, drafts, num_reqs, max_model_len):
    original(buffers, idx_mapping, sampled, drafts, num_reqs, max_model_len + K)


def _draft_in_prefill(original, buffers, idx_mapping, lens, sampled, *args):
    original(buffers, idx_mapping, lens, torch.ones_like(sampled), *args)


def _next_step(original, self, first_step, *args, **kwargs):
    original(self, min(first_step + 1, K - 1), *args, **kwargs)


def _next_slot(idx_mapping):
    return torch.where(idx_mapping >= 0, (idx_mapping + 1) % MAX_NUM_REQS, idx_mapping)


def _store_elsewhere(original, self, first_step, idx_mapping, *args):
    original(self, first_step, _next_slot(idx_mapping), *args)


def _gather_elsewhere(original, self, idx_mapping, *args, **kwargs):
    return original(self, _next_slot(idx_mapping), *args, **kwargs)


def _one_too_few(original, self, idx_mapping_np, num_valid):
    original(self, idx_mapping_np, np.where(num_valid > 0, num_valid - 1, num_valid))


DEFECTS = {
    "a pass moves on by two": lambda: _wrap(speculator_module, "advance", _advance_by_two),
    "a pass does not grow what is attended to": lambda: _wrap(
        speculator_module, "advance", _keep_lengths
    ),
    "a row drafts past the last position": lambda: _wrap(speculator_module, "advance", _never_out),
    "rejections are forgotten": lambda: _wrap(
        speculator_module, "prepare_first_pass", _forget_rejections
    ),
    "a row drafts in the middle of its prefill": lambda: _wrap(
        speculator_module, "prepare_first_pass", _draft_in_prefill
    ),
    "a new owner keeps the old one's states": lambda: mock.patch.object(
        ExitStates, "invalidate", return_value=None
    ),
    "a mid-prefill row counts as drafted": lambda: mock.patch.object(
        LayerSkipSpeculator,
        "_record_valid_exit_states",
        lambda self, batch, k: self.draft_state.exit_states.set_num_valid(batch.idx_mapping_np, k),
    ),
    "fewer passes count than ran": lambda: _wrap(ExitStates, "set_num_valid", _one_too_few),
    "rows may differ in their drafts": lambda: _wrap(
        LayerSkipModelState,
        "_covered",
        _with(
            num_draft_tokens_per_req=lambda batch: (
                None
                if batch.num_draft_tokens_per_req is None
                else np.full_like(batch.num_draft_tokens_per_req, batch.num_draft_tokens_per_req[0])
            ),
            num_scheduled_tokens=lambda batch: np.full_like(
                batch.num_scheduled_tokens, batch.num_scheduled_tokens[0]
            ),
        ),
    ),
    "states are stored one step on": lambda: _wrap(ExitStates, "store", _next_step),
    "states are stored for another request": lambda: _wrap(ExitStates, "store", _store_elsewhere),
    "states are read from another request": lambda: _wrap(ExitStates, "gather", _gather_elsewhere),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect):
    """Negative control: each defect makes the machine fail."""
    quick = settings(TEST_SETTINGS, phases=[Phase.generate], print_blob=False)
    with DEFECTS[defect](), pytest.raises(BaseException) as error:  # noqa: PT011
        run_as_test(Bookkeeping, settings=quick)
    assert isinstance(error.value, (AssertionError, LookupError, BaseExceptionGroup))
