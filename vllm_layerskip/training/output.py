# SPDX-License-Identifier: Apache-2.0
"""The finished checkpoint: an ordinary one of transformers, with the ``layerskip`` block.

Adapters are merged into it, and lie in a folder within it, too: a small file that makes the same
checkpoint out of its base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from vllm_layerskip.files.whole import UNFINISHED, replace_folder, write_json
from vllm_layerskip.training.config import OutputConfig
from vllm_layerskip.training.model import add_lora, build_empty
from vllm_layerskip.training.recipe import Recipe
from vllm_layerskip.twins.adapter_config import CONFIG_NAME

if TYPE_CHECKING:
    from peft import PeftModel

LORA_FOLDER = "lora"
"""Of the adapters, in the checkpoint's folder."""


def layerskip_block(
    recipe: Recipe, exit_layer: int | None = None, num_speculative_tokens: int | None = None
) -> dict[str, Any]:
    """config.json's block, which ``exit_layer="auto"`` reads; without E and K, the recipe alone."""
    serving = {"exit_layer": exit_layer, "num_speculative_tokens": num_speculative_tokens}
    block = {name: value for name, value in serving.items() if value is not None}
    return block | {"recipe": recipe.to_dict()}


def output_dtype(output: OutputConfig, base: PretrainedConfig, from_scratch: bool) -> torch.dtype:
    """The dtype of the stored weights."""
    if output.dtype != "auto":
        return getattr(torch, output.dtype)
    if from_scratch or base.dtype is None:
        return torch.bfloat16
    return getattr(torch, base.dtype) if isinstance(base.dtype, str) else base.dtype


def write_checkpoint(
    folder: Path,
    config: PretrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    lora: Mapping[str, Any] | None = None,
) -> None:
    """Write ``folder``, whole or not at all; an existing one is replaced.

    Args:
        state_dict: all weights; with ``lora`` also those of the adapters.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{UNFINISHED}-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    config.use_cache = True  # The trainer turns it off.
    model = _with_weights(config, state_dict, lora)
    if lora is not None:
        save_adapters(model, unfinished / LORA_FOLDER, model.state_dict(), dtype)
        model = model.merge_and_unload()
    _cast_weights(model, dtype)
    model.tie_weights()
    model.config.dtype = dtype
    if generation_config is not None:
        model.generation_config = generation_config
    _make_valid(model.generation_config)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    replace_folder(unfinished, folder)


def _with_weights(
    config: PretrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    lora: Mapping[str, Any] | None,
) -> Any:
    """The model on the CPU; with ``lora`` peft's, adapters apart."""
    model = build_empty(config)
    if lora is not None:
        model = add_lora(model, lora)
    tensors = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def save_adapters(
    model: PeftModel,
    folder: Path,
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> None:
    """Write what was trained as a folder of peft; the same run writes the same files.

    Args:
        state_dict: the weights of ``model``, adapters among them.
        dtype: of the stored weights; None: their own.
    """
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    tensors = {name: state_dict[name].detach().cpu().to(dtype) for name in trained}
    # The embeddings are the base's; peft would otherwise look the base up to find that out.
    model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # peft keeps them in a set.
    write_json(folder / CONFIG_NAME, settings, indent=2)


def _cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters only: rotary frequencies are buffers, and are not stored."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _make_valid(generation: GenerationConfig) -> None:
    """Make the settings storable: older checkpoints set sampling options, but not do_sample."""
    generation.use_cache = True
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
