# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are fit to be scored: complete decoders whose exits we can compute.

Arguments ``source`` are the option that names the checkpoint, for messages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.evaluation.exits import check_decoder
from vllm_layerskip.evaluation.scores import last_exit_difference
from vllm_layerskip.files.unreadable import unreadable


def load_config(name: str, source: str, trust_remote_code: bool = False) -> Any:
    """A checkpoint's config, if it is a decoder-only causal language model.

    Raises:
        UserError: it cannot be read, or is another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except unreadable() as error:
        raise UserError(
            f"{source} {name}: no config could be read ({first_line(error)}). Give a folder with "
            "config.json, or a name on the model hub."
        ) from None
    architectures = list(config.architectures or ())
    if config.is_encoder_decoder or not any("CausalLM" in name for name in architectures):
        raise UserError(
            f"{source} {name}: its architecture {architectures} is no decoder-only causal language "
            "model, so its layers predict no next tokens. Give a ...ForCausalLM, such as a Llama, "
            "Mistral, Qwen2 or Qwen3."
        )
    return config


def load_model(
    name: str,
    source: str,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """A checkpoint's causal language model, complete.

    Raises:
        UserError: it cannot be read, weights are missing, or it has no exits.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except unreadable() as error:
        raise UserError(
            f"{source} {name}: the model could not be read ({first_line(error)}). Give a complete "
            "checkpoint."
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{source} {name}: {len(missing)} weights are missing, {missing[0]} first. Give a "
            "complete checkpoint."
        )
    try:
        check_decoder(model)
    except ValueError as error:
        raise UserError(f"{source} {name}: {error}") from None
    return model.to(device).eval()


def check_exit_head(
    model: nn.Module, token_ids: torch.Tensor, tolerance: float, name: str, source: str
) -> None:
    """The last layer's exit must predict what the model itself predicts.

    Args:
        token_ids: ``[B, T]``, text to compare both on.
        tolerance: largest relative difference of logits.

    Raises:
        UserError: it does not, as where a model scales its logits in a way that we do not know.
    """
    difference = last_exit_difference(model, token_ids.to(model.device))
    if difference > tolerance:
        raise UserError(
            f"{source} {name}: the logits of {type(model).__name__} are not those of its final "
            f"norm and LM head on the last layer's output (relative difference {difference:.1e}), "
            "so its exits cannot be scored."
        )
