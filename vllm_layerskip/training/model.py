# SPDX-License-Identifier: Apache-2.0
"""The model and tokenizer of a run: a checkpoint to go on with, or a new model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_layerskip.errors import UserError, first_line, one_line
from vllm_layerskip.evaluation.exits import check_decoder
from vllm_layerskip.files import tokenizers
from vllm_layerskip.files.unreadable import unreadable
from vllm_layerskip.training.config import AnyRecipe, ModelConfig, OutputConfig, check_keys


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the section ``model`` names, by default the checkpoint's.

    Raises:
        UserError: there is none.
    """
    if model.tokenizer is not None:
        return tokenizers.load_tokenizer(
            model.tokenizer, "model.tokenizer", revision=model.revision
        )
    source = "model.tokenizer (default: model.path)"
    return tokenizers.load_tokenizer(str(model.path), source, revision=model.revision)


def load_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The config of the model to train, checked before any weight is read.

    Raises:
        UserError: there is none, or it is not one of a causal language model with exits.
    """
    if model.path is None:
        return _new_config(model, tokenizer)
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except unreadable() as error:
        raise UserError(
            f"model.path: {model.path!r} holds no checkpoint that could be read "
            f"({one_line(error)}). Name a folder with config.json and weights, or a name on the "
            "model hub."
        ) from None
    names = config.architectures or []
    if names and not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            f"model.path: {model.path!r} is a {', '.join(names)}, not a causal language model. "
            "Name a checkpoint of a decoder such as LlamaForCausalLM or Qwen3ForCausalLM."
        )
    return config


def _new_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    try:
        known = AutoConfig.for_model(model.model_type).to_dict()
    except (KeyError, ValueError):
        raise UserError(
            f"model.model_type={model.model_type!r} is no architecture of transformers. Use one "
            'such as "llama", "mistral", "qwen2" or "qwen3".'
        ) from None
    check_keys(model.config, known, "model.config")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return AutoConfig.for_model(model.model_type, **{**defaults, **model.config})
    except unreadable() as error:
        reason = one_line(error).rstrip(".")
        raise UserError(f"model.config: {reason}. Correct the value.") from None


def check_model(
    config: PretrainedConfig,
    recipe: AnyRecipe,
    output: OutputConfig,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    from_scratch: bool,
) -> None:
    """Refuse a model without exits, or one that the rest of the config does not fit.

    Raises:
        UserError: it names the key.
    """
    try:
        check_decoder(build_empty(config))
    except ValueError as error:
        raise UserError(f"model: {first_line(error)}.") from None
    num_layers = config.num_hidden_layers
    try:
        recipe.check_depth(num_layers)
    except ValueError as error:
        raise UserError(f"recipe.{error}") from None
    if output.exit_layer is not None and not 1 <= output.exit_layer < num_layers:
        raise UserError(
            f"output.exit_layer={output.exit_layer} must be in 1..{num_layers - 1}: the model has "
            f"{num_layers} layers, and at least one must be left to verify."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise UserError(
            f"data.seq_len={seq_len} must be at most {longest}, the model's "
            "max_position_embeddings."
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        remedy = (
            f"Set model.config.vocab_size to at least {largest + 1}, or leave it out"
            if from_scratch
            else "Name one that fits: with model.path the size is the checkpoint's"
        )
        raise UserError(
            f"model.tokenizer: it yields token id {largest}, but the model has vocab_size="
            f"{config.vocab_size}. {remedy}."
        )


def build_empty(config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights.

    Raises:
        ValueError: transformers has no causal language model for the config.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_model(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """The model with weights: a checkpoint's, or new ones.

    Raises:
        UserError: the checkpoint cannot be read, or lacks weights.
    """
    dtype = getattr(torch, model.dtype)
    if model.path is None:
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=model.attn_implementation
        )
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=dtype,
            revision=model.revision,
            attn_implementation=model.attn_implementation,
            output_loading_info=True,
        )
    except unreadable() + (RuntimeError,) as error:
        raise UserError(
            f"model.path: the weights of {model.path!r} could not be read ({first_line(error)}). "
            "Name a complete checkpoint."
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model.path: {model.path!r} lacks {len(missing)} weights, such as {missing[0]}. Name "
            "a complete checkpoint of a causal language model."
        )
    return loaded


def _check_lora_values(lora: Mapping[str, Any]) -> None:
    """Refuse values that peft would work with before it finds them wrong."""
    for name, (is_valid, valid) in _LORA_VALUES.items():
        if name in lora and not is_valid(lora[name]):
            raise UserError(f"lora.{name}={lora[name]!r} must be {valid}. Correct the value.")


# Python's bool is an int, and YAML's yes is a bool.
_LORA_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and value >= 1, "an integer of at least 1"),
    "lora_alpha": (
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
        "a number above 0",
    ),
    "lora_dropout": (
        lambda value: type(value) in (int, float) and 0 <= value < 1,
        "a number from 0 to below 1",
    ),
    "use_rslora": (lambda value: type(value) is bool, "true or false"),
}


def add_lora(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    """Freeze the model and add adapters to its linear layers.

    Raises:
        UserError: a key or value is none of ``peft.LoraConfig``.
    """
    from peft import LoraConfig, get_peft_model

    check_keys(lora, (item.name for item in dataclasses.fields(LoraConfig)), "lora")
    _check_lora_values(lora)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    try:
        return get_peft_model(model, LoraConfig(**{**defaults, **lora}))
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"lora: {first_line(error)}. Correct the value.") from None
