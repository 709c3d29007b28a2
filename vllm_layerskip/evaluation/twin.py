# SPDX-License-Identifier: Apache-2.0
"""A transformers model turned into its draft twin: every layer's weights rounded or adapted.

A twin of all L layers has the twins of every exit in it. What it tells of drafts in an engine is an
approximation. There a draft attends to what the *target* wrote at earlier positions, and to what
the twin wrote only at the positions of its own step; here it is the twin's at every position, so an
engine accepts about as many drafts, or a few more. Kernels may round activations, too; here they
are not rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.settings import Checkpoint, TwinSettings
from vllm_layerskip.twins.adapter import AdapterWeights, DraftAdapter, read_draft_adapter
from vllm_layerskip.twins.adapter_target import FINAL_NORM, target_of
from vllm_layerskip.twins.kinds import INT4, NONE, group_sizes_of
from vllm_layerskip.twins.rounding import round_trip


def check_twin(settings: TwinSettings, checkpoint: Checkpoint, config: Any) -> DraftAdapter | None:
    """Check that a checkpoint may have the twin, before weights load; returns its adapter.

    Raises:
        UserError: the checkpoint is quantised, no weight of it can be rounded, or the adapter does
            not fit it or has values that are not finite.
    """
    _, name, _ = checkpoint
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{settings.option}: {name} is quantised already (quantization_config in its "
            "config.json). Give the checkpoint that it was made from."
        )
    try:
        if settings.draft_quantization == INT4:
            _check_groups(settings, target_of(config, name, config.num_hidden_layers).linears)
        if settings.draft_adapter is None:
            return None
        folder = Path(name)
        adapter = read_draft_adapter(
            Path(settings.draft_adapter),
            f"--draft-adapter {settings.draft_adapter}",
            hf_config=config,
            base_name=name,
            num_layers=config.num_hidden_layers,
            base_folder=folder if folder.is_dir() else None,
        )
        AdapterWeights(adapter).check_finite()
        return adapter
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_groups(settings: TwinSettings, linears: dict[str, tuple[int, ...]]) -> None:
    if not any(group_sizes_of(num_inputs) for _, num_inputs in linears.values()):
        sizes = ", ".join(map(str, sorted({num_inputs for _, num_inputs in linears.values()})))
        raise UserError(
            f"{settings.option}: int4 needs linear layers whose inputs are a multiple of 32, and "
            f"those of this model have {sizes}. Give int8 or fp8."
        )


@torch.no_grad()
def make_twin(model: nn.Module, draft_quantization: str, adapter: DraftAdapter | None) -> list[str]:
    """Give ``model`` its twin's weights, in place: adapter merged, then rounded, LM head too.

    Embeddings stay, those that are tied to the LM head as well.

    Returns:
        The linear layers that cannot be rounded.

    Raises:
        ValueError: the adapter's weights are not finite, or its files have changed.
    """
    weights = None if adapter is None else AdapterWeights(adapter)
    whole: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = _merged(module.weight, None if weights is None else weights.delta(path))
        if draft_quantization == INT4 and not group_sizes_of(module.in_features):
            whole.append(path)
        elif draft_quantization != NONE:
            weight = round_trip(weight, draft_quantization)
        if weight is not module.weight:
            # A new parameter: the LM head's may be the embedding's.
            module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    if weights is not None:
        _set_exit(model.get_submodule(FINAL_NORM), weights)
    return whole


def _set_exit(norm: Any, weights: AdapterWeights) -> None:
    """Give the final norm the adapter's weight, and its translator behind it."""
    own, translator = weights.final_norm(), weights.translator()
    if own is not None:
        norm.weight.copy_(own)
    if translator is not None:
        matrix = translator.to(norm.weight)
        norm.register_forward_hook(lambda _norm, _args, output: F.linear(output, matrix))


def _merged(
    weight: torch.Tensor,  # [N, M]
    delta: torch.Tensor | None,
) -> torch.Tensor:
    return weight if delta is None else weight.float() + delta.to(weight.device)
