# SPDX-License-Identifier: Apache-2.0
"""One linear layer of the draft twin: the target's own, with other weights.

The layer is a copy of vLLM's object with another quantisation method, so its forward, its sharding
over ranks and its reduction are the host's. The copy's tensors are its own, also its bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from vllm_layerskip.worker.twin_methods import TwinMethod, twin_method

logger = init_logger("vllm.layerskip.twin")


class TwinLinear:
    """One linear layer of the twin, beside the target's.

    Args:
        target: the target's layer. Its weight is read when vLLM processes it.
        kind: what the twin's weight is made of.
        adapted: adds an adapter's part to a weight ``[N, M]``, in place; None without.
    """

    def __init__(
        self,
        target: Any,
        kind: str,
        adapted: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        weight = target.weight
        self.target = target
        self.shape = tuple(weight.shape)
        self._adapted = adapted
        self.method: TwinMethod = twin_method(kind, *self.shape, weight.dtype)
        # The host's own layer, with its own forward, sharding and reduction.
        self.module: Any = copy.copy(target)
        self.module._parameters = {}
        self.module.quant_method = self.method

    def watch(self) -> None:
        """Make the twin's weight whenever vLLM has loaded the target's."""
        method = self.target.quant_method
        process = method.process_weights_after_loading

        def process_weights_after_loading(layer: nn.Module) -> None:
            self.make()
            process(layer)

        # Each linear layer has a method object of its own.
        method.process_weights_after_loading = process_weights_after_loading

    @property
    def has_source(self) -> bool:
        """Whether the target's weight is still there in full."""
        return tuple(self.target.weight.shape) == self.shape

    def make(self) -> None:
        """Make the twin's weight from the target's."""
        weight = self.target.weight.data
        if self._adapted is not None:
            weight = weight.clone()
            self._adapted(weight)
        self.method.make_weights(self.module, weight, getattr(self.target, "bias", None))


def twin_of_head(lm_head: Any, kind: str) -> TwinLinear | None:
    """``lm_head`` in another kind of weight; None if its size fits no kernel."""
    try:
        return TwinLinear(lm_head, kind)
    except (ValueError, NotImplementedError) as error:
        logger.warning_once(
            "LayerSkip's drafts use the target's LM head: %s", " ".join(str(error).split())
        )
        return None
