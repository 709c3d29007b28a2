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
  after the tokens of every step.
* A row that may not draft writes nothing: ``idx_mapping = -1`` turns its slots into PAD. That
  holds for dummy rows, for rows in the middle of their prefill (nothing was sampled), and for
  a row as soon as its position would pass the model's last one.
* Only committed tokens publish blocks to the prefix cache, and a draft pass writes after those.

Nothing here waits for the device: rows, counts and bounds come from the host's side of the
batch, token ids and positions stay on the device.

All K passes of a batch replay as one CUDA graph where there is one (``draft_graphs.py``). What
a graph reads and writes is persistent: vLLM's and our input buffers, the block tables, the
exit states. Its padded rows have ``idx_mapping = -1`` and no query.
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
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.utils import AttentionGroup

from vllm_layerskip import __version__
from vllm_layerskip.config.layerskip_config import LayerSkipConfig
from vllm_layerskip.host import version
from vllm_layerskip.host.environment import DRAFT_GRAPHS, flag
from vllm_layerskip.worker.draft_graphs import DraftCudaGraphManager
from vllm_layerskip.worker.draft_head import DraftHead
from vllm_layerskip.worker.draft_inputs import advance, prepare_first_pass
from vllm_layerskip.worker.draft_state import DraftState
from vllm_layerskip.worker.early_layers import early_attn_layer_names
from vllm_layerskip.worker.model_state import LayerSkipModelState

logger = init_logger("vllm.layerskip.speculator")


class LayerSkipSpeculator(DraftModelSpeculator):
    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = vllm_config.speculative_config
        assert isinstance(config, LayerSkipConfig)
        self.exit_layer = config.exit_layer
        self.draft_steps = torch.arange(self.num_speculative_steps, device=device)
        self.draft_graphs: DraftCudaGraphManager | None = None
        self.early_attn_layer_names: set[str] = set()
        self.draft_attn_layer_names: set[str] = set()  # The runner must see no draft layers.

    @property
    def num_positions(self) -> int:
        """Current ``max_model_len``; vLLM may lower it to fit memory after the base class of 0.32
        copied it."""
        return self.vllm_config.model_config.max_model_len

    def load_model(self, target_model: nn.Module) -> None:
        # Drafting has no weights and no attention layers of its own.
        attn_layer_names = set(get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase))
        self.model = self.load_draft_model(target_model, attn_layer_names)
        self._validate_local_argmax_reduction()
        self.draft_twin = self.model.draft_twin
        self.exit_model = self.model
        if self.draft_twin is not None:
            self.draft_twin.after_load()
            self.exit_model = self.draft_twin.exit_model
        self.draft_head = self._make_draft_head()
        self._log_start()

    def num_bytes(self) -> dict[str, int]:
        """Extra memory of drafting on this rank, by the names of ``StepCounts``."""
        twin, head = self.draft_twin, self.draft_head
        return {
            "num_bytes_exit_states": self.draft_state.exit_states.num_bytes,
            "num_bytes_twin_layers": 0 if twin is None else twin.num_bytes,
            "num_bytes_draft_head": (0 if twin is None else twin.num_head_bytes)
            + (0 if head is None else head.num_bytes),
        }

    def _log_start(self) -> None:
        logger.info_once(
            "LayerSkip %s on vLLM %s: layers 0..%d of %d draft (exit_layer %d), %d speculative "
            "tokens, exit-state reuse %s; extra memory: %d bytes of exit states.",
            __version__,
            version.vllm_version(),
            self.exit_layer - 1,
            self.vllm_config.model_config.get_total_num_hidden_layers(),
            self.exit_layer,
            self.num_speculative_steps,
            "on" if self.speculative_config.reuse_exit_states else "off",
            self.draft_state.exit_states.num_bytes,
        )

    def _make_draft_head(self) -> DraftHead | None:
        draft_vocab = self.speculative_config.draft_vocab
        if draft_vocab is None:
            return None
        # DraftHead maps the argmax to token ids; only a sampled draft needs logits.
        self.use_local_argmax_reduction = self.draft_logits is None
        kind = self.speculative_config.draft_quantization
        return DraftHead(self.model, draft_vocab, self.draft_logits, self.exit_model, kind)

    def compute_draft_logits(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        return (self.draft_head or self.exit_model).compute_logits(hidden_states)

    def get_draft_top_tokens(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        return (self.draft_head or self.exit_model).get_top_tokens(hidden_states)

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        self.early_attn_layer_names = early_attn_layer_names(
            target_attn_layer_names, self.exit_layer
        )
        self.draft_state: DraftState = target_model.draft_state
        return target_model

    def set_attn(
        self,
        model_state: LayerSkipModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        # It rides with the counts of the first step.
        model_state.step_counts = model_state.step_counts._replace(**self.num_bytes())
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
        # All passes are one graph, so a backend must refresh its metadata inside the graph.
        fused = (
            cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
            and self.supports_decode_metadata_update
            and self.draft_state.lora_rows is None
            and flag(DRAFT_GRAPHS, default=True)
        )
        self.draft_graphs = DraftCudaGraphManager(
            self.vllm_config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if fused else CUDAGraphMode.NONE,
        )

    def capture(self) -> None:
        assert self.draft_graphs is not None
        if not self.draft_graphs.needs_capture():
            return
        logger.info("Capturing draft passes...")
        # Rows without a request: capturing writes neither K/V nor exit states.
        self.idx_mapping.fill_(-1)
        self.draft_graphs.capture(
            self._generate_fused_drafts,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing draft CUDA graphs",
        )

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
            # Drafts share the target's cache, which needs no catching up; the runner blanks them.
            return self.draft_tokens[:num_reqs]

        if self.draft_head is not None:
            self.draft_head.refresh()
        if self.draft_twin is not None:
            self.draft_twin.refresh()
        if self.draft_state.lora_rows is not None:
            self.draft_state.lora_rows.map_drafts(input_batch, dummy_run)
        max_seq_len = int(input_batch.seq_lens_cpu_upper_bound[:num_reqs].max())
        self.draft_max_seq_len = min(max_seq_len + num_speculative_tokens, self.num_positions)
        self._copy_request_inputs(
            num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run
        )
        prepare_first_pass(
            self.input_buffers,
            self.idx_mapping,
            input_batch.seq_lens,
            num_sampled,
            num_rejected,
            last_sampled,
            num_reqs,
            self.num_positions,
        )
        batch_desc = self._dispatch(num_reqs, num_speculative_tokens, is_profile)
        if batch_desc.cg_mode == CUDAGraphMode.FULL:
            self._replay_drafts(batch_desc)
        else:
            self._generate_drafts(
                batch_desc,
                num_speculative_tokens,
                skip_attn=dummy_run and skip_attn_for_dummy_run,
                seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
            )
        return self.draft_tokens[:num_reqs]

    def _record_valid_exit_states(
        self, input_batch: InputBatch, num_speculative_tokens: int
    ) -> None:
        # A row in the middle of its prefill samples nothing, so it drafts nothing.
        # Its counts on the host are exact; only those of decodes run ahead.
        mid_prefill = (
            input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
            < input_batch.prefill_len_np
        )
        self.draft_state.exit_states.set_num_valid(
            input_batch.idx_mapping_np, (~mid_prefill) * num_speculative_tokens
        )

    def _dispatch(
        self, num_reqs: int, num_speculative_tokens: int, is_profile: bool
    ) -> BatchExecutionDescriptor:
        if self.draft_graphs is None or is_profile:
            return BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_reqs,
                num_reqs=num_reqs,
                uniform_token_count=1,
            )
        return self.draft_graphs.dispatch_drafts(num_reqs, num_speculative_tokens)

    def _replay_drafts(self, batch_desc: BatchExecutionDescriptor) -> None:
        for groups in self.attn_groups:
            for group in groups:
                # Write the block table, as kernels see it, to the buffer that the graph reads.
                group.map_to_kernel_block_table(
                    self.block_tables.input_block_tables[group.kv_cache_group_id]
                )
        assert self.draft_graphs is not None
        self.draft_graphs.run_fullgraph(batch_desc)

    def _generate_fused_drafts(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        num_tokens_across_dp: torch.Tensor | None,  # unused: dense models
        cudagraph_runtime_mode: CUDAGraphMode,  # unused: NONE, inside of the graph
        num_speculative_steps: int,
    ) -> None:
        """Run all passes as a graph holds them, refreshing metadata in place before each."""
        for step in range(num_speculative_steps):
            self._compute_slot_mappings(num_reqs)
            self._update_draft_decode_metadata(attn_metadata, num_reqs)
            self._draft_pass(step, num_reqs, attn_metadata, slot_mappings)

    def _generate_drafts(
        self,
        batch_desc: BatchExecutionDescriptor,
        num_speculative_tokens: int,
        skip_attn: bool,
        seq_lens_cpu_upper_bound: torch.Tensor,
    ) -> None:
        """Run all passes without a graph, rebuilding metadata before each."""
        num_reqs = batch_desc.num_tokens
        attn_metadata, slot_mappings = None, None
        for step in range(num_speculative_tokens):
            if not skip_attn:
                slot_mappings = build_slot_mappings_by_layer(
                    self._compute_slot_mappings(num_reqs), self.kv_cache_config
                )
                attn_metadata = self._build_uniform_attn_metadata(
                    batch_desc=batch_desc,
                    num_reqs=num_reqs,
                    num_query_per_req=1,
                    seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
                    step=step + 1,
                )
            self._draft_pass(step, num_reqs, attn_metadata, slot_mappings)

    def _compute_slot_mappings(self, num_reqs: int) -> torch.Tensor:
        return self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_reqs],
            self.input_buffers.query_start_loc[: num_reqs + 1],
            self.input_buffers.positions[:num_reqs],
            num_reqs,
        )

    def _draft_pass(
        self,
        step: int,
        num_reqs: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
    ) -> None:
        idx_mapping = self.idx_mapping[:num_reqs]
        positions = self.input_buffers.positions[:num_reqs]
        with set_forward_context(
            attn_metadata, self.vllm_config, num_tokens=num_reqs, slot_mapping=slot_mappings
        ):
            hidden_states, residual = self.model.run_early_stage(
                self.input_buffers.input_ids[:num_reqs], positions
            )
        if self.speculative_config.reuse_exit_states:
            self.draft_state.exit_states.store(step, idx_mapping, hidden_states, residual)
        sampled = self.sample_draft(
            self.exit_model.exit_norm(hidden_states, residual),
            positions,
            idx_mapping,
            self.temperature,
            self.seeds,
            self.draft_steps[step],
            self.draft_logits,
        )
        advance(
            self.input_buffers,
            self.idx_mapping,
            sampled,
            self.draft_tokens[:, step],
            num_reqs,
            self.num_positions,
        )
