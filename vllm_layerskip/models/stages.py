# SPDX-License-Identifier: Apache-2.0
"""A decoder cut at the exit layer: early stage, late stage, exit head.

Written once for every dense decoder of vLLM. Families differ in how embeddings are scaled,
whether the residual stream is a pair, and what the last norm takes. Each of these is a method of
``Decoder`` that a family may override.

The two stages are separate compiled units: one graph for the whole model could not be
entered in the middle. They hold the backbone's own layer modules and are kept outside of
the module tree (a tuple is no submodule), so parameter names, loaded weights and memory
are those of the model without LayerSkip.

Shapes: T tokens, R requests, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.ir.op import IrOp

from vllm_layerskip.config.layerskip_config import LayerSkipConfig
from vllm_layerskip.config.weight_files import missing_weights
from vllm_layerskip.models.exit_head import ExitHead
from vllm_layerskip.worker.draft_state import DraftState
from vllm_layerskip.worker.draft_twin import DraftTwin
from vllm_layerskip.worker.model_state import LayerSkipModelState
from vllm_layerskip.worker.verify_plan import VerifyPlan, current_verify_plan

if TYPE_CHECKING:
    from vllm.sequence import IntermediateTensors


class Decoder:
    """The loop over the layers of a vLLM model, in parts; the defaults are Llama's.

    Each part calls the model's own modules, with what vLLM's own loop would pass.
    """

    model: Any

    def scale_embeds(
        self,
        inputs_embeds: torch.Tensor,  # [T, H]
    ) -> torch.Tensor:
        """``[T, H]``: what the first layer takes."""
        return inputs_embeds

    def run_layer(
        self,
        layer: nn.Module,
        positions: torch.Tensor,  # [T]
        hidden_states: torch.Tensor,  # [T, H]
        residual: torch.Tensor | None,  # [T, H]; None before the first layer
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[T, H]`` each; the second is None if the first is the whole residual stream."""
        return layer(positions, hidden_states, residual)

    def final_norm(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``[T, H]``: what ``compute_logits`` takes. May overwrite its arguments."""
        return self.model.norm(hidden_states, residual)[0]


class StreamDecoder(Decoder):
    """Layers take and return the residual stream as one tensor."""

    def run_layer(
        self,
        layer: nn.Module,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return layer(positions, hidden_states), None

    def final_norm(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.model.norm(hidden_states)


# One symbol for T in every argument, as in vLLM's own models: unbacked shapes need it.
_T = {0: "b"}


@support_torch_compile(dynamic_arg_dims={"input_ids": _T, "positions": _T, "inputs_embeds": _T})
class EarlyStage(nn.Module):
    """Embedding and layers 0..E-1, the target's or a twin's."""

    def __init__(self, *, vllm_config: VllmConfig, model: Any, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._embed_input_ids = model.model.embed_input_ids
        self._scale_embeds, self._run_layer = model.scale_embeds, model.run_layer

    def forward(
        self,
        input_ids: torch.Tensor | None,  # [T]
        positions: torch.Tensor,  # [T]
        inputs_embeds: torch.Tensor | None = None,  # [T, H], instead of input_ids
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs_embeds is None:
            inputs_embeds = self._embed_input_ids(input_ids)
        hidden_states = self._scale_embeds(inputs_embeds)
        residual = None
        for layer in self.layers:
            hidden_states, residual = self._run_layer(layer, positions, hidden_states, residual)
        if residual is None:
            residual = torch.zeros_like(hidden_states)
        return hidden_states, residual  # [T, H] each: the exit state


@support_torch_compile(dynamic_arg_dims={"positions": _T, "hidden_states": _T, "residual": _T})
class LateStage(nn.Module):
    """Layers E..L-1 and the final norm."""

    def __init__(self, *, vllm_config: VllmConfig, model: Any, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._run_layer, self._final_norm = model.run_layer, model.final_norm

    def forward(
        self,
        positions: torch.Tensor,  # [T]
        hidden_states: torch.Tensor,  # [T, H]
        residual: torch.Tensor,  # [T, H]
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden_states, residual = self._run_layer(layer, positions, hidden_states, residual)
        return self._final_norm(hidden_states, residual)  # [T, H]


class LayerSkipForCausalLM(ExitHead, Decoder, nn.Module):
    """Mixin before a ``*ForCausalLM`` of vLLM; it runs the forward in two stages."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        config = vllm_config.speculative_config
        if not isinstance(config, LayerSkipConfig):
            raise ValueError(
                f"{type(self).__name__} needs a LayerSkip engine. Set speculative_config="
                "{'method': 'layerskip'}, and leave the checkpoint's architectures as they are. "
                "(With hf_overrides={'early_exit_layer': E} the first E layers serve alone.)"
            )
        if not vllm_config.use_v2_model_runner:
            raise ValueError(
                "LayerSkip runs on vLLM's Model Runner V2, and this engine's settings select V1 "
                "(vLLM logged which). Remove the setting that V2 does not support."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self._add_missing_head()
        self.exit_layer = config.exit_layer
        self.draft_state = DraftState(vllm_config, self)
        self.draft_twin = DraftTwin(self, vllm_config) if config.has_twin else None
        self._stages = self._make_stages(vllm_config)
        self._late_stage_inputs = _late_stage_inputs(vllm_config, self.draft_twin is None)
        self._takes_embeds = vllm_config.model_config.enable_prompt_embeds
        # After dummy weights, a load may bring only a part of the weights.
        self._loads_checkpoint = (
            vllm_config.load_config.load_format != "dummy"
            and vllm_config.model_config.quantization is None
        )

    def _add_missing_head(self) -> None:
        """For families that name their LM head otherwise (``EmbeddingHead``)."""

    def _make_stages(self, vllm_config: VllmConfig) -> tuple[nn.Module, ...]:
        """The compiled units: both stages of the target, or the twin's early stage alone.

        With a twin, nothing is reused, so the target runs as vLLM's own model does.
        """
        parts = {"vllm_config": vllm_config, "model": self}
        if self.draft_twin is not None:
            with set_model_tag("layerskip_twin"):
                return (EarlyStage(**parts, layers=self.draft_twin.layers),)
        layers = self.model.layers
        with set_model_tag("layerskip_early"):
            early_stage = EarlyStage(**parts, layers=layers[: self.exit_layer])
        with set_model_tag("layerskip_late"):
            late_stage = LateStage(**parts, layers=layers[self.exit_layer :])
        return early_stage, late_stage

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """The modules of the tree, and the stages beside it.

        vLLM looks here for what it compiled: to know that there is something, and to free it when
        an engine ends. A stage's layers are in the tree already and are not walked again.
        """
        yield from super().modules(*args, **kwargs)
        yield from getattr(self, "_stages", ())

    @classmethod
    def get_model_state_cls(cls) -> type:
        return LayerSkipModelState

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the weights as vLLM does, and check that none is missing.

        Raises:
            ValueError: the checkpoint that the engine starts from lacks weights.
        """
        checkpoint_names: set[str] = set()

        def seen() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                checkpoint_names.add(name)
                yield name, weight

        loaded_names = super().load_weights(seen())
        if self._loads_checkpoint and self.num_weight_changes == 1:
            missing = missing_weights(
                (name for name, _ in self.named_parameters()),
                getattr(self, "packed_modules_mapping", {}),
                loaded_names,
                checkpoint_names,
            )
            if missing:
                raise ValueError(
                    f"The checkpoint lacks {len(missing)} weight(s): {', '.join(missing[:8])}"
                    f"{', ...' if len(missing) > 8 else ''}. Copy or download it again."
                )
        return loaded_names

    def run_early_stage(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._takes_embeds and inputs_embeds is None:
            # A stage is compiled once, for one kind of input, and drafts come as token ids.
            inputs_embeds, input_ids = self.model.embed_input_ids(input_ids), None
        return self._stages[0](input_ids, positions, inputs_embeds)

    def exit_norm(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The exit head up to the LM head. May overwrite its arguments."""
        with fused_norms():
            return self.final_norm(hidden_states, residual)

    def forward(
        self,
        input_ids: torch.Tensor | None,  # [T]
        positions: torch.Tensor,  # [T]
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,  # [T, H], with prompt embeddings
    ) -> torch.Tensor:
        """Run both stages; with a plan, start from the drafts' exit states.

        ``worker/model_state.py`` decides whether there is a plan; ``worker/verify_plan.py`` carries
        it here.
        """
        if self.draft_twin is not None:
            # By name, as vLLM calls it: some families take no more by position.
            return super().forward(
                input_ids,
                positions,
                intermediate_tensors=intermediate_tensors,
                inputs_embeds=inputs_embeds,
            )
        plan = current_verify_plan()
        if plan is None:
            hidden_states, residual = self.run_early_stage(input_ids, positions, inputs_embeds)
        else:
            assert input_ids is not None, "no exit states are reused with prompt embeddings"
            hidden_states, residual = self._reuse_exit_states(input_ids, positions, plan)
        if get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            # A piecewise graph reads its inputs where they were at capture. By then, the next
            # graph may own the memory of the early stage's last graph.
            num_tokens = positions.shape[0]
            hidden_states = self._late_stage_inputs[0, :num_tokens].copy_(hidden_states)
            residual = self._late_stage_inputs[1, :num_tokens].copy_(residual)
        return self._stages[1](positions, hidden_states, residual)

    def _reuse_exit_states(
        self, input_ids: torch.Tensor, positions: torch.Tensor, plan: VerifyPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exit states of all T tokens, running the early stage for one token per request."""
        num_tokens_per_req = plan.num_speculative_tokens + 1
        last = slice(
            plan.num_speculative_tokens, plan.num_reqs * num_tokens_per_req, num_tokens_per_req
        )
        context = replace(
            get_forward_context(),
            attn_metadata=plan.attn_metadata,
            slot_mapping=plan.slot_mappings,
            # Piecewise graphs have sizes for the whole batch, not for one token per request.
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            batch_descriptor=None,
        )
        with override_forward_context(context):
            # Copies: a compiled stage expects its inputs dense and aligned.
            last_hidden_states, last_residual = self.run_early_stage(
                input_ids[last].clone(memory_format=torch.contiguous_format),
                positions[last].clone(memory_format=torch.contiguous_format),
            )
        return self.draft_state.exit_states.gather(
            plan.idx_mapping,
            plan.num_speculative_tokens,
            last_hidden_states,
            last_residual,
            num_tokens=positions.shape[0],
        )


class EmbeddingHead(nn.Module):
    """Mixin before ``LayerSkipForCausalLM`` for a model that has no LM head of its own and
    uses its embedding as one."""

    model: Any

    def _add_missing_head(self) -> None:
        # The embedding under the name that a draft's own head replaces.
        self.lm_head = self.model.embed_tokens

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)


@contextmanager
def fused_norms() -> Iterator[None]:
    """Have norms outside of a compiled unit run vLLM's fused kernel where there is one.

    With torch.compile vLLM's default for a norm is code that Inductor fuses. Without Inductor it
    runs a kernel for each of eleven operators, and the exit norm runs once a draft pass.
    """
    with ExitStack() as stack:
        for norm in map(IrOp.registry.get, _NORMS):
            if norm is not None and _FUSED in norm.impls:  # Where it cannot run, vLLM skips it.
                stack.enter_context(norm.set_priority([_FUSED, "native"]))
        yield


_NORMS = ("rms_norm", "fused_add_rms_norm")
_FUSED = "vllm_c"
"""vLLM's name for its own compiled kernels."""


def _late_stage_inputs(vllm_config: VllmConfig, has_late_stage: bool = True) -> torch.Tensor:
    """``[2, T, H]`` for the largest T that a graph is captured for.

    T = 0 without graphs, and with a draft twin: there is no late stage then.

    Made whatever mode was asked for: vLLM turns to piecewise graphs where an attention backend
    needs them, and learns that only after the model is built.
    """
    largest = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    num_tokens = largest if has_late_stage else 0
    model_config = vllm_config.model_config
    # Made on the model's device, which is the default while a model is built.
    return torch.zeros(2, num_tokens, model_config.get_hidden_size(), dtype=model_config.dtype)
