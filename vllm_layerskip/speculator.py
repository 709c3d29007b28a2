# SPDX-License-Identifier: Apache-2.0
"""Drafts K tokens with layers 0..E-1, inside the target's paged KV cache.

A draft pass is a one-token decode of the early stage, so its K/V writes are real writes to
the target's cache. Why they are safe:

* The first input is the token that was just sampled, at its own position p and in its own
  slot (no EAGLE shift); draft k + 1 goes to p + k + 1. The next verify step runs the same
  tokens at the same positions. What it accepts stays valid as it is; what it rejects is
  overwritten before anything attends to it, since a token is written no later than it is
  first attended to.
* Those slots are allocated: the scheduler reserves K lookahead slots (``num_lookahead_tokens``)
  behind the tokens of every step.
* A row that may not draft writes nothing: ``idx_mapping = -1`` turns its slots into PAD. That
  holds for dummy rows, for rows in the middle of their prefill (nothing was sampled), and for
  a row from the moment when its position would pass the last one of the model.
* Blocks are published to the prefix cache by committed tokens only, and a draft pass writes
  behind those.

Nothing here waits for the device: rows, counts and bounds come from the host's side of the
batch, token ids and positions stay on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.utils import AttentionGroup

from vllm_layerskip import __version__, host
from vllm_layerskip.config import LayerSkipConfig
from vllm_layerskip.draft_head import DraftHead
from vllm_layerskip.exit_states import ExitStates
from vllm_layerskip.models.stages import early_attn_layer_names

logger = init_logger("vllm.layerskip.speculator")


class LayerSkipSpeculator(DraftModelSpeculator):
    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = vllm_config.speculative_config
        assert isinstance(config, LayerSkipConfig)
        self.exit_layer = config.exit_layer
        self.exit_states = ExitStates(
            self.max_num_reqs, self.num_speculative_steps, self.hidden_size, self.dtype, device
        )
        self.current_draft_step = torch.tensor(0, dtype=torch.int64, device=device)
        self.arange = torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)
        self.early_attn_layer_names: set[str] = set()
        self.draft_attn_layer_names: set[str] = set()  # The runner must see no draft layers.
        logger.info_once(
            "LayerSkip %s on vLLM %s: layers 0..%d of %d draft (exit_layer %d), %d speculative "
            "tokens, exit-state reuse %s; extra memory: %d bytes of exit states.",
            __version__,
            host.vllm_version(),
            self.exit_layer - 1,
            vllm_config.model_config.get_total_num_hidden_layers(),
            self.exit_layer,
            self.num_speculative_steps,
            "on" if config.reuse_exit_states else "off",
            self.exit_states.num_bytes,
        )

    def load_model(self, target_model: nn.Module) -> None:
        # No weights and no attention layers of its own.
        attn_layer_names = set(get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase))
        self.model = self.load_draft_model(target_model, attn_layer_names)
        self._validate_local_argmax_reduction()
        self.draft_head = self._make_draft_head()

    def _make_draft_head(self) -> DraftHead | None:
        draft_vocab = self.speculative_config.draft_vocab
        if draft_vocab is None:
            return None
        # The argmax is mapped to token ids there; only a sampled draft needs logits.
        self.use_local_argmax_reduction = self.draft_logits is None
        return DraftHead(self.model, draft_vocab, self.draft_logits)

    def compute_draft_logits(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        return (self.draft_head or self.model).compute_logits(hidden_states)

    def get_draft_top_tokens(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        return (self.draft_head or self.model).get_top_tokens(hidden_states)

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        self.early_attn_layer_names = early_attn_layer_names(
            target_attn_layer_names, self.exit_layer
        )
        target_model.exit_states = self.exit_states
        return target_model

    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        self.draft_attn_layer_names = self.early_attn_layer_names
        try:
            super().set_attn(
                model_state,
                kv_cache_config,
                block_tables,
                target_input_buffers,
                target_attn_groups,
            )
        finally:
            self.draft_attn_layer_names = set()

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Draft passes run eagerly or compiled, without graphs."""

    def capture(self) -> None:
        """Nothing to capture."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,  # unused
        aux_hidden_states: list[torch.Tensor] | None,  # unused
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs]
        num_rejected: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,  # unused
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        num_reqs = input_batch.num_reqs
        if num_speculative_tokens is None:
            num_speculative_tokens = self.num_speculative_steps
        if not dummy_run:
            self._record_valid_exit_states(input_batch, num_speculative_tokens)
        if num_speculative_tokens == 0:
            # The target's own cache needs no catching up.
            return self.draft_tokens[:num_reqs].fill_(-1)

        if self.draft_head is not None:
            self.draft_head.refresh()
        max_seq_len = int(input_batch.seq_lens_cpu_upper_bound[:num_reqs].max())
        self.draft_max_seq_len = min(max_seq_len + num_speculative_tokens, self.max_model_len)
        self._copy_request_inputs(
            num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run
        )
        self._prepare_first_pass(input_batch, num_sampled, num_rejected, last_sampled)
        for step in range(num_speculative_tokens):
            self._draft_pass(
                step,
                num_reqs,
                skip_attn=dummy_run and skip_attn_for_dummy_run,
                seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
            )
        return self.draft_tokens[:num_reqs]

    def _record_valid_exit_states(
        self, input_batch: InputBatch, num_speculative_tokens: int
    ) -> None:
        # Of a row in the middle of its prefill nothing is sampled, so it drafts nothing.
        # Its counts on the host are exact; only those of decodes run ahead.
        mid_prefill = (
            input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
            < input_batch.prefill_len_np
        )
        self.exit_states.set_num_valid(
            input_batch.idx_mapping_np, (~mid_prefill) * num_speculative_tokens
        )

    def _prepare_first_pass(
        self,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
    ) -> None:
        num_reqs = input_batch.num_reqs
        buffers = self.input_buffers
        idx_mapping = self.idx_mapping[:num_reqs]
        # Behind the accepted tokens: where the sampled token itself belongs.
        position = input_batch.seq_lens[:num_reqs] - num_rejected[:num_reqs]
        drafts = (num_sampled[:num_reqs] > 0) & (position < self.max_model_len) & (idx_mapping >= 0)
        sampled = last_sampled.view(-1)[idx_mapping.clamp(min=0)]
        idx_mapping.masked_fill_(~drafts, -1)
        buffers.input_ids[:num_reqs] = sampled * drafts
        buffers.positions[:num_reqs] = position * drafts
        # A row that drafts nothing attends to one (stale) token; its result is not used.
        buffers.seq_lens[:num_reqs] = position * drafts + 1
        buffers.seq_lens[num_reqs:].zero_()
        buffers.query_start_loc.copy_(self.arange.clamp(max=num_reqs))

    def _draft_pass(
        self,
        step: int,
        num_reqs: int,
        skip_attn: bool,
        seq_lens_cpu_upper_bound: torch.Tensor,
    ) -> None:
        buffers = self.input_buffers
        idx_mapping = self.idx_mapping[:num_reqs]
        input_ids = buffers.input_ids[:num_reqs]
        positions = buffers.positions[:num_reqs]

        attn_metadata, slot_mappings = None, None
        if not skip_attn:
            slot_mappings = build_slot_mappings_by_layer(
                self.block_tables.compute_slot_mappings(
                    idx_mapping, buffers.query_start_loc[: num_reqs + 1], positions, num_reqs
                ),
                self.kv_cache_config,
            )
            attn_metadata = self._build_uniform_attn_metadata(
                batch_desc=BatchExecutionDescriptor(
                    cg_mode=CUDAGraphMode.NONE,
                    num_tokens=num_reqs,
                    num_reqs=num_reqs,
                    uniform_token_count=1,
                ),
                num_reqs=num_reqs,
                num_query_per_req=1,
                seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
                step=step + 1,
            )
        with set_forward_context(
            attn_metadata, self.vllm_config, num_tokens=num_reqs, slot_mapping=slot_mappings
        ):
            hidden_states, residual = self.model.run_early_stage(input_ids, positions)
        self.exit_states.store(step, idx_mapping, hidden_states, residual)

        self.current_draft_step.fill_(step)
        draft_tokens = self.sample_draft(
            self.model.exit_norm(hidden_states, residual),
            positions,
            idx_mapping,
            self.temperature,
            self.seeds,
            self.current_draft_step,
            self.draft_logits,
        )
        # Sampling leaves rows that it skips undefined; an id must stay in the vocabulary.
        draft_tokens.masked_fill_(idx_mapping < 0, 0)
        self.draft_tokens[:num_reqs, step] = draft_tokens
        self._advance(num_reqs, draft_tokens)

    def _advance(self, num_reqs: int, draft_tokens: torch.Tensor) -> None:
        buffers = self.input_buffers
        positions = buffers.positions[:num_reqs]
        seq_lens = buffers.seq_lens[:num_reqs]
        buffers.input_ids[:num_reqs] = draft_tokens
        positions.add_(1)
        seq_lens.add_(1)
        # Past the model's last position a row stops: it must not overwrite a real token.
        self.idx_mapping[:num_reqs].masked_fill_(positions >= self.max_model_len, -1)
        positions.clamp_(max=self.max_model_len - 1)
        seq_lens.clamp_(max=self.max_model_len)
