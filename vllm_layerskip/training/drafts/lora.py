# SPDX-License-Identifier: Apache-2.0
"""Adapters on the layers that draft: peft's LoRA on linear layers of layers 0..E-1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from vllm_layerskip.config.draft_vocab import read_draft_vocab
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.drafts.recipe import DraftRecipe
from vllm_layerskip.training.drafts.translator import add_translator, own_norm
from vllm_layerskip.training.model import add_lora, build_empty

DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32}


def check_draft_model(
    config: PretrainedConfig, recipe: DraftRecipe, lora: Mapping[str, Any] | None
) -> None:
    """Refuse a model or a section ``lora`` of which no draft adapter can be made.

    Raises:
        UserError: it names the key.
    """
    model = build_empty(config)
    for layer in model.model.layers[: recipe.exit_layer]:
        if not hasattr(layer, "self_attn"):
            raise UserError(
                f"recipe.target='frozen': {type(layer).__name__} has no self_attn, so drafts "
                "cannot be shown the K/V of the model itself. Use a dense decoder such as "
                "LlamaForCausalLM or Qwen3ForCausalLM."
            )
    head = model.get_output_embeddings()
    if read_tokens(recipe, config.vocab_size) and not isinstance(head, nn.Linear):
        raise UserError(
            f"recipe.draft_vocab={recipe.draft_vocab!r}: the LM head of {type(model).__name__} is "
            f"a {type(head).__name__}, of which no rows can be picked. Leave draft_vocab out."
        )
    add_draft_lora(model, recipe, lora)


def read_tokens(recipe: DraftRecipe, vocab_size: int) -> tuple[int, ...] | None:
    """The tokens that drafts may be, ascending; None: all.

    Raises:
        UserError: the file cannot be read, or is no draft vocabulary of this model.
    """
    if recipe.draft_vocab is None:
        return None
    source = f"recipe.draft_vocab={recipe.draft_vocab!r}"
    try:
        return read_draft_vocab(Path(recipe.draft_vocab), source, vocab_size).token_ids
    except ValueError as error:
        raise UserError(str(error)) from None


def add_draft_lora(
    model: nn.Module, recipe: DraftRecipe, lora: Mapping[str, Any] | None
) -> nn.Module:
    """Freeze the model; add adapters to layers 0..E-1, and what the recipe wants behind them.

    Raises:
        UserError: a value is none of ``peft.LoraConfig``, or names no linear layer.
    """
    settings = {**DEFAULTS, **(lora or {})}
    names = _linear_names(model.model.layers[: recipe.exit_layer])  # type: ignore[index,union-attr]
    given = settings.get("target_modules", "all-linear")
    settings["target_modules"] = names if given == "all-linear" else _checked(given, names)
    settings["layers_to_transform"] = list(range(recipe.exit_layer))
    settings["layers_pattern"] = "layers"
    if recipe.final_norm or recipe.exit_translator:
        settings["modules_to_save"] = ["model.norm"]  # peft takes the ends of names.
    adapted = add_lora(model, settings)
    if recipe.exit_translator:
        add_translator(adapted)
    if "modules_to_save" in settings:
        _train_in_float32(own_norm(adapted))
    return adapted


def _train_in_float32(norm: nn.Module) -> None:
    """As peft does it for LoRA itself: in bfloat16 small steps would round away."""
    norm.float()
    # Whoever takes its output expects the dtype of what went in.
    norm.register_forward_hook(lambda _norm, args, output: output.to(args[0].dtype))


def _linear_names(layers: nn.Module) -> list[str]:
    """Names of linear layers, as their parents call them: ``q_proj``."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in layers.named_modules()
            if isinstance(module, nn.Linear)
        }
    )


def _checked(given: Any, names: list[str]) -> list[str]:
    wanted = given if isinstance(given, list | tuple) else [given]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise UserError(
            f"lora.target_modules={given!r} must name linear layers of the model's layers: "
            f"{', '.join(names)}. Leave target_modules out for all of them."
        )
    return list(wanted)
