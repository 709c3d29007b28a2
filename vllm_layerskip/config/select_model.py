# SPDX-License-Identifier: Apache-2.0
"""Selects our model class for an engine's model, or says why there is none.

It reads vLLM's resolved model config, before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES, LayerSkipModel
from vllm_layerskip.host import check

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Entries of a checkpoint's ``layer_types`` that LayerSkip can run."""

_REMEDY = (
    "Use another speculative method, or a dense decoder-only text model: "
    "docs/models.md lists the architectures, docs/adding-an-architecture.md how to add one."
)


def select_model(model_config: Any) -> LayerSkipModel:
    """The class that runs ``model_config``'s model with LayerSkip.

    Raises:
        ValueError: there is none; the message says what kind of model it is.
        RuntimeError: vLLM's class of that architecture is not the one that ours fits.
    """
    if model_config.runner_type != "generate":
        raise ValueError(
            f"LayerSkip drafts text, but the engine runs with runner={model_config.runner_type!r}. "
            "Leave speculative_config out, or set runner='generate'."
        )
    architecture = model_config.architecture
    model = SUPPORTED_ARCHITECTURES.get(architecture)
    problem = next(_problems(model_config, known=model is not None), None)
    if problem is not None or model is None:
        raise ValueError(
            f"LayerSkip does not support the model {model_config.model!r} "
            f"({architecture}): {problem or 'it has no early-exit class for this architecture'}. "
            f"Supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}. {_REMEDY}"
        )
    if model.vllm is not None:
        check.require_model(architecture, model.vllm)
    return model


def _problems(model_config: Any, known: bool) -> Iterator[str]:
    """Reasons why LayerSkip cannot run the model, the plainest first."""
    hf_config = model_config.hf_text_config
    if model_config.is_encoder_decoder:
        yield "it is an encoder-decoder model, and LayerSkip exits from decoder-only models"
    if model_config.is_multimodal_model or model_config.is_multimodal_raw_input_only_model:
        yield "it is a multimodal model, and LayerSkip runs text models only"
    if model_config.is_attention_free:
        yield "it has no attention layers (a state space model)"
    if model_config.is_hybrid or model_config.has_inner_state:
        yield (
            "it is a hybrid model whose layers keep a state beside the KV cache (Mamba or linear "
            "attention), which rejected drafts would spoil"
        )
    if model_config.is_moe:
        yield (
            f"it is a mixture of experts ({model_config.get_num_experts()} experts), and LayerSkip "
            "runs dense models only"
        )
    if model_config.is_diffusion:
        yield "it is a diffusion model, which does not decode token by token"
    if model_config.using_transformers_backend():
        yield (
            "vLLM runs it through Transformers' modelling code (its Transformers backend), whose "
            "layers LayerSkip does not call"
        )
    layer_types = set(getattr(hf_config, "layer_types", None) or ())
    if known and not layer_types <= LAYER_TYPES:
        yield (
            f"config.json has layer_types={sorted(layer_types)}, and LayerSkip runs "
            f"{sorted(LAYER_TYPES)} only"
        )
    if getattr(hf_config, "dual_chunk_attention_config", None):
        yield "config.json has dual_chunk_attention_config, and LayerSkip was not tested with it"
    if getattr(hf_config, "use_bidirectional_attention", None) or model_config.is_mm_prefix_lm:
        yield "its attention is bidirectional, and drafts need causal attention"
