# SPDX-License-Identifier: Apache-2.0
"""One linear layer of the draft twin: the target's own, with other weights.

The layer is a copy of vLLM's object with another quantisation method, so its forward, its sharding
over ranks and its reduction are the host's. The copy's tensors are its own, also its bias.

Its weight is made from the target's: from the parameter itself, before vLLM packs or drops it, or,
where the target is quantised, from what the target's layer gives for unit vectors once vLLM has
processed it. So no format of a checkpoint needs code here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_layerskip.worker.twin_methods import TwinMethod, twin_method

logger = init_logger("vllm.layerskip.twin")

_UNIT_VECTORS = 1024  # Bounds the memory beside a weight.


class TwinLinear:
    """One linear layer of the twin, beside the target's.

    Args:
        target: the target's layer, built and not loaded.
        kind: what the twin's weight is made of.
        dtype: the model's.
        adapted: adds an adapter's part to a weight ``[N, M]``, in place; None without.

    Raises:
        ValueError: vLLM has no kernel for the kind and the layer's sizes on this machine.
    """

    def __init__(
        self,
        target: Any,
        kind: str,
        dtype: torch.dtype,
        adapted: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        if getattr(target, "input_scale", None) is not None:
            raise ValueError(
                "the target rounds activations with scales that are part of its checkpoint, so its "
                "weight cannot be read off its answers to unit vectors."
            )
        self.is_made = False
        self.target = target
        self.is_plain = has_plain_weight(target)
        self.shape = _shape(target)
        self._dtype, self._adapted = dtype, adapted
        self.method: TwinMethod = twin_method(kind, *self.shape, dtype)
        # The host's own layer, with its own forward, sharding and reduction.
        self.module: Any = copy.copy(target)
        self.module._parameters = {}
        self.module.quant_method = self.method

    def watch(self) -> None:
        """Make the twin's weight whenever vLLM has loaded the target's."""
        method = self.target.quant_method
        process = method.process_weights_after_loading

        def process_weights_after_loading(layer: nn.Module) -> None:
            is_ours = layer is self.target
            if is_ours and self.is_plain:
                self.make()
            process(layer)
            if is_ours and not self.is_plain:
                self.make()

        method.process_weights_after_loading = process_weights_after_loading

    @property
    def has_source(self) -> bool:
        """Whether the target's weight can still be read."""
        return not self.is_plain or tuple(self.target.weight.shape) == self.shape

    def make(self) -> None:
        """Make the twin's weight from the target's."""
        weight = self.target.weight.data if self.is_plain else self._responses()
        if self._adapted is not None:
            weight = weight.clone()
            self._adapted(weight)
        self.method.make_weights(self.module, weight, getattr(self.target, "bias", None))
        self.is_made = True

    @torch.no_grad()
    def _responses(self) -> torch.Tensor:
        """``[N, M]``: a quantised target's weight, as its layer uses it.

        The response to a unit vector is a column of the weight. Kernels that round activations by
        their own largest value round a unit vector exactly.
        """
        device = next(self.target.parameters()).device
        columns = []
        for start in range(0, self.shape[1], _UNIT_VECTORS):
            stop = min(start + _UNIT_VECTORS, self.shape[1])
            unit = torch.zeros(stop - start, self.shape[1], dtype=self._dtype, device=device)
            unit[:, start:stop].fill_diagonal_(1)
            columns.append(self.target.quant_method.apply(self.target, unit))
        return torch.cat(columns).t().contiguous()


def has_plain_weight(layer: Any) -> bool:
    """Whether a linear layer or an LM head keeps its weight as a plain matrix."""
    return isinstance(layer.quant_method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)


def _shape(layer: Any) -> tuple[int, int]:
    """(N, M) of this rank's shard."""
    if has_plain_weight(layer):
        num_outputs, num_inputs = layer.weight.shape
        return num_outputs, num_inputs
    return (
        getattr(layer, "output_size_per_partition", layer.output_size),
        getattr(layer, "input_size_per_partition", layer.input_size),
    )


def twin_of_head(lm_head: Any, kind: str, dtype: torch.dtype) -> TwinLinear | None:
    """``lm_head`` in another kind of weight; None if its size fits no kernel."""
    try:
        return TwinLinear(lm_head, kind, dtype)
    except (ValueError, NotImplementedError) as error:
        logger.warning_once(
            "LayerSkip's drafts use the target's LM head: %s", " ".join(str(error).split())
        )
        return None
