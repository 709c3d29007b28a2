# SPDX-License-Identifier: Apache-2.0
"""The models that LayerSkip can run, by architecture, as data.

Importing this module imports no vLLM. ``docs/adding-an-architecture.md`` says how another
package adds a model of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

_PAIR = ("positions", "hidden_states", "residual")
_STREAM = ("positions", "hidden_states")
_EARLY_EXIT = "EarlyExit"


@dataclass(frozen=True)
class VllmModel:
    """The classes of vLLM that a class of ours runs; each path is ``module:class``."""

    causal_lm: str
    backbone: str
    layer: str
    layer_parameters: tuple[str, ...] = _PAIR
    """The arguments of its layers, in order."""


@dataclass(frozen=True)
class LayerSkipModel:
    """A model class that can stop after layer E."""

    architecture: str
    """Its name in vLLM's registry."""
    path: str
    """``module:class``, imported on first use."""
    vllm: VllmModel | None = None
    """The classes of vLLM that it derives from; None for a class of another package."""
    families: str = ""
    """Well-known models of the architecture, for the documentation."""
    differs: str = ""
    """How it differs from Llama, for the documentation."""


def _model(
    module: str,
    causal_lm: str,
    backbone: str,
    layer: str,
    layer_parameters: tuple[str, ...] = _PAIR,
    *,
    families: str,
    differs: str = "",
) -> LayerSkipModel:
    name = "LayerSkip" + causal_lm.partition(":")[2]
    causal_lm, backbone, layer = (
        f"vllm.model_executor.models.{path}" for path in (causal_lm, backbone, layer)
    )
    return LayerSkipModel(
        architecture=name,
        path=f"vllm_layerskip.models.{module}:{name}",
        vllm=VllmModel(causal_lm, backbone, layer, layer_parameters),
        families=families,
        differs=differs,
    )


_LLAMA = _model(
    "llama",
    "llama:LlamaForCausalLM",
    "llama:LlamaModel",
    "llama:LlamaDecoderLayer",
    families="Llama 2, 3, 3.1, 3.2 (text), 3.3, Code Llama, Yi, DeepSeek-R1-Distill-Llama",
)
_MISTRAL = _model(
    "llama",
    "mistral:MistralForCausalLM",
    "mistral:MistralModel",
    "mistral:MistralDecoderLayer",
    families="Mistral 7B, Mistral Nemo, Codestral, Ministral",
    differs="sliding window in every layer (v0.1) or none",
)
_COHERE = _model(
    "cohere",
    "commandr:CohereForCausalLM",
    "commandr:CohereModel",
    "commandr:CohereDecoderLayer",
    families="Command R, Command R7B, Command A",
    differs="attention and MLP in parallel, the embedding as LM head, logit scale, "
    "interleaved sliding windows (Cohere2)",
)
_GRANITE = _model(
    "stream",
    "granite:GraniteForCausalLM",
    "granite:GraniteModel",
    "granite:GraniteDecoderLayer",
    _STREAM,
    families="Granite 3.x dense",
    differs="multipliers of embeddings, residuals, attention and logits",
)

SUPPORTED_ARCHITECTURES: dict[str, LayerSkipModel] = {
    "LlamaForCausalLM": _LLAMA,
    # Other names that vLLM gives to its Llama class.
    "LLaMAForCausalLM": _LLAMA,
    "InternLM3ForCausalLM": _LLAMA,
    "IQuestCoderForCausalLM": _LLAMA,
    "TeleChat3ForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "Ministral3ForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": _model(
        "qwen",
        "qwen2:Qwen2ForCausalLM",
        "qwen2:Qwen2Model",
        "qwen2:Qwen2DecoderLayer",
        families="Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
        differs="attention biases",
    ),
    "Qwen3ForCausalLM": _model(
        "qwen",
        "qwen3:Qwen3ForCausalLM",
        "qwen3:Qwen3Model",
        "qwen3:Qwen3DecoderLayer",
        families="Qwen3 dense (0.6B to 32B)",
        differs="norms of queries and keys",
    ),
    "MiMoForCausalLM": _model(
        "qwen",
        "mimo:MiMoForCausalLM",
        "mimo:MiMoModel",
        "qwen2:Qwen2DecoderLayer",
        families="MiMo 7B",
        differs="the last norm is part of the LM head",
    ),
    "Phi3ForCausalLM": _model(
        "llama",
        "phi3:Phi3ForCausalLM",
        "llama:LlamaModel",
        "llama:LlamaDecoderLayer",
        families="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        differs="fused projections in the checkpoint",
    ),
    "Ernie4_5ForCausalLM": _model(
        "llama",
        "ernie45:Ernie4_5ForCausalLM",
        "llama:LlamaModel",
        "llama:LlamaDecoderLayer",
        families="ERNIE 4.5 0.3B",
        differs="interleaved rotary embeddings",
    ),
    "GemmaForCausalLM": _model(
        "gemma",
        "gemma:GemmaForCausalLM",
        "gemma:GemmaModel",
        "gemma:GemmaDecoderLayer",
        families="Gemma, CodeGemma",
        differs="scaled embeddings",
    ),
    "Gemma2ForCausalLM": _model(
        "gemma",
        "gemma2:Gemma2ForCausalLM",
        "gemma2:Gemma2Model",
        "gemma2:Gemma2DecoderLayer",
        families="Gemma 2",
        differs="scaled embeddings, the embedding as LM head, soft caps of attention and "
        "logits, interleaved sliding windows",
    ),
    "Gemma3ForCausalLM": _model(
        "gemma",
        "gemma3:Gemma3ForCausalLM",
        "gemma3:Gemma3Model",
        "gemma3:Gemma3DecoderLayer",
        families="Gemma 3 270M, 1B and other text-only checkpoints",
        differs="scaled embeddings, norms of queries and keys, two rotary bases, interleaved "
        "sliding windows",
    ),
    "Glm4ForCausalLM": _model(
        "others",
        "glm4:Glm4ForCausalLM",
        "glm4:Glm4Model",
        "glm4:Glm4DecoderLayer",
        families="GLM-4-0414, GLM-Z1 (9B, 32B)",
        differs="norms after each block, partial rotary embeddings",
    ),
    "ApertusForCausalLM": _model(
        "others",
        "apertus:ApertusForCausalLM",
        "apertus:ApertusModel",
        "apertus:ApertusDecoderLayer",
        families="Apertus",
        differs="xIELU activations, norms of queries and keys",
    ),
    "NemotronForCausalLM": _model(
        "others",
        "nemotron:NemotronForCausalLM",
        "nemotron:NemotronModel",
        "nemotron:NemotronDecoderLayer",
        families="Nemotron-4, Minitron",
        differs="LayerNorm, squared ReLU, partial rotary embeddings",
    ),
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": _COHERE,
    "GraniteForCausalLM": _GRANITE,
    "GraniteSWAForCausalLM": _GRANITE,
    "HyperCLOVAXForCausalLM": _model(
        "stream",
        "hyperclovax:HyperCLOVAXForCausalLM",
        "hyperclovax:HyperCLOVAXModel",
        "hyperclovax:HyperCLOVAXDecoderLayer",
        families="HyperCLOVA X SEED (text)",
        differs="multipliers as in Granite, norms after each block",
    ),
    "Exaone4ForCausalLM": _model(
        "stream",
        "exaone4:Exaone4ForCausalLM",
        "exaone4:Exaone4Model",
        "exaone4:Exaone4DecoderLayer",
        families="EXAONE 4.0",
        differs="norms after each block only, interleaved sliding windows, full-attention "
        "layers without rotary embedding",
    ),
    "StableLmForCausalLM": _model(
        "stream",
        "stablelm:StablelmForCausalLM",
        "stablelm:StableLMEpochModel",
        "stablelm:StablelmDecoderLayer",
        _STREAM,
        families="StableLM 3B, StableLM 2",
        differs="LayerNorm, partial rotary embeddings",
    ),
}
"""Models by the architecture that a checkpoint's ``config.json`` names."""


def early_exit_architectures() -> dict[str, str]:
    """The name of our early-exit class for each supported architecture."""
    return {name: f"{_EARLY_EXIT}{name}" for name in SUPPORTED_ARCHITECTURES}


def early_exit_path(architecture: str) -> str:
    """``module:class`` of our early-exit class for a supported architecture."""
    return f"vllm_layerskip.models.early_exit:{_EARLY_EXIT}{architecture}"


def register_architecture(architecture: str, path: str) -> None:
    """Let LayerSkip run models of ``architecture`` with the class at ``path``.

    Call it in every process of vLLM, from an entry point of the group ``vllm.general_plugins``;
    it may run before or after LayerSkip's own plugin. The class derives from
    ``vllm_layerskip.models.stages.LayerSkipForCausalLM`` and from the class that vLLM runs
    without LayerSkip. A later call for the same architecture replaces an earlier one.

    Args:
        architecture: name in the ``architectures`` of the checkpoint's ``config.json``.
        path: ``module:class``; imported when an engine with LayerSkip loads such a model.

    Raises:
        ValueError: ``path`` is not of the form ``module:class``.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    module, _, name = path.partition(":")
    if not module or not name.isidentifier():
        raise ValueError(
            f"register_architecture({architecture!r}, {path!r}): the path must be "
            "'module:class', as in 'my_package.models:LayerSkipMyForCausalLM'."
        )
    model = LayerSkipModel(architecture=f"LayerSkip{architecture}", path=path)
    SUPPORTED_ARCHITECTURES[architecture] = model
    ModelRegistry.register_model(model.architecture, model.path)
    ModelRegistry.register_model(
        early_exit_architectures()[architecture], early_exit_path(architecture)
    )
