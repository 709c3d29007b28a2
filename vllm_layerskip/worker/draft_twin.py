# SPDX-License-Identifier: Apache-2.0
"""The draft twin: layers 0..E-1 with other weights, on the target's own K/V pages.

A twin's layers are the target's: the same norms, rotary embedding, attention objects (and so the
same names, metadata and K/V pages) and the family's own code. Only their linear layers differ:
rounded to fewer bits, with an adapter merged, or both. E may be L then: a whole model in 4 bits
drafts for itself.

Why the output stays exactly the target's, whatever the twin computes:

* **Who writes which K/V.** A draft pass at position q writes the twin's K/V of layers 0..E-1 at q,
  for q = p..p+K-1, where p is the position of the token that was sampled last. The target's
  forward writes K/V of all layers at every position that it computes.
* **Every position that a draft wrote is computed by the target before the target reads it.** The
  next step of the request computes p, p+1, .. up to its last scheduled token, and each layer
  writes a step's K/V before its attention reads. A draft that is not verified (a smaller
  number of drafts by schedule, a full batch, a grammar, a preemption) leaves K/V after the last
  computed token; attention never looks there, and a later token writes its own first.
* **Nothing else reads the twin's K/V.** Attention of the target stops at the position of its
  query. A block is published to the prefix cache when its tokens are committed, and a committed
  token was computed by the target. K/V connectors are refused (``config/admission.py``).
* **The twin reads** the target's K/V at positions before p and its own at p..q. Whatever that
  gives is a guess, and rejection sampling makes of any guess the target's distribution.
* **Exit states are not reused.** Verification would start from the twin's states, which are not
  the target's, so ``reuse_exit_states`` is off with a twin and there are none.

Slots, padding, lookahead and the model's last position are those of any draft pass
(``speculator.py``). The target's parameters are only read.

**When the weights are made.** vLLM may pack and drop a weight once it is loaded (its CPU build
does), so each watched linear layer makes the twin's weight in the hook where vLLM processes
what it loaded, before vLLM does. ``refresh`` makes them again where weights changed in place.

The twin's modules are not in the model's module tree: parameter names, loading and LoRA see the
target alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from vllm_layerskip.config.layerskip_config import LayerSkipConfig
from vllm_layerskip.twins.adapter import AdapterWeights
from vllm_layerskip.twins.kinds import KINDS, NONE
from vllm_layerskip.worker.lm_heads import is_plain_head, with_head
from vllm_layerskip.worker.twin_linear import TwinLinear, twin_of_head
from vllm_layerskip.worker.twin_methods import USUAL_SIZE, kinds_that_work, twin_method

logger = init_logger("vllm.layerskip.twin")

_QKV = ("q", "k", "v")
_TRIAL_S = 0.03
"""How long one linear layer is timed on each side."""
SLOWER = 1.1
"""A twin's linear layer is called slower from this ratio on; less is noise."""


class DraftTwin:
    """The twin of a model's first layers, its exit norm and its LM head.

    Args:
        model: a ``LayerSkipForCausalLM`` that was built, and not loaded yet.

    Raises:
        ValueError: vLLM has no kernel for the kind on this machine.
    """

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        config = vllm_config.speculative_config
        assert isinstance(config, LayerSkipConfig)
        self._config = config
        self.kind = config.draft_quantization
        self._model = model
        self._dtype = vllm_config.model_config.dtype
        self._adapter = (
            None if config.draft_adapter is None else AdapterWeights(config.draft_adapter)
        )
        self._num_weight_changes = -1
        self._exit_weights: list[tuple[nn.Parameter, torch.Tensor]] = []
        """The adapter's norm and translator: where they are used, and their values."""
        self._merged: set[str] = set()
        self.linears: list[TwinLinear] = []
        self.num_full_width = 0
        """Linear layers whose size fits no kernel: the target's own, or with an adapter a copy."""
        self._problem = ""
        if self.kind != NONE:
            self._require_kernels()
        layers = model.model.layers[: config.exit_layer]
        self.layers = [
            self._twin_of(layer, f"model.layers.{index}") for index, layer in enumerate(layers)
        ]
        self._require_all_merged()
        if not self.linears:
            raise ValueError(
                f"speculative_config: draft_quantization={self.kind!r} changes none of the layers "
                "that draft: vLLM has no kernel for it of their sizes on this machine: "
                f"{self._problem} Set draft_quantization to another of {', '.join(KINDS)}, or to "
                "'none', with exit_layer below the model's number of layers."
            )
        # A draft vocabulary's head is made of the rows that it picks (draft_head.py).
        self.head = self._head() if self.kind != NONE and config.draft_vocab is None else None
        for linear in self._all_linears():
            linear.watch()
        self.exit_model = self._exit_model()

    def _require_all_merged(self) -> None:
        """Check that vLLM's class has a layer for each part of the adapter."""
        adapter, config = self._adapter, self._config.draft_adapter
        if adapter is None or config is None:
            return
        missing = sorted(set(adapter.module_names) - self._merged)
        if missing:
            raise ValueError(
                f"{config.source}: the adapter changes {missing[0]}, and "
                f"{type(self._model).__name__} has no linear layer of that name. Train an adapter "
                "for other target_modules, or leave draft_adapter out."
            )

    def _head(self) -> TwinLinear | None:
        """The LM head in the twin's kind; None for the target's own."""
        if not is_plain_head(self._model.lm_head):
            return None  # A quantised checkpoint's, which has few bits already.
        return twin_of_head(self._model.lm_head, self.kind, self._dtype)

    def _require_kernels(self) -> None:
        try:
            twin_method(self.kind, USUAL_SIZE, USUAL_SIZE, self._dtype)
        except (ValueError, NotImplementedError) as error:
            lack = " ".join(str(error).split())
            working = kinds_that_work(self._dtype)
            raise ValueError(
                f"speculative_config: draft_quantization={self.kind!r}: vLLM has no kernel for it "
                f"on this machine with dtype {str(self._dtype).removeprefix('torch.')}: {lack} "
                f"Kinds that work here: {', '.join(working) or 'none'}. Set draft_quantization "
                "(--draft-quantization) to one of them, or to 'none'."
            ) from None

    def _twin_of(self, module: nn.Module, name: str) -> nn.Module:
        """``module`` with the twin's linear layers; modules without any are shared."""
        if isinstance(module, LinearBase):
            return self._twin_linear(module, name)
        children = {
            child_name: child and self._twin_of(child, f"{name}.{child_name}")
            for child_name, child in module._modules.items()
        }
        if all(children[key] is child for key, child in module._modules.items()):
            return module
        twin = copy.copy(module)
        twin._modules = children
        return twin

    def _twin_linear(self, linear: Any, name: str) -> nn.Module:
        adapted = self._adapted(linear, name)
        if self.kind == NONE and adapted is None:
            return linear
        try:
            twin = TwinLinear(linear, self.kind, self._dtype, adapted)
        except (ValueError, NotImplementedError) as error:
            self._problem = " ".join(str(error).split())
            logger.warning_once(
                "LayerSkip's draft twin has %s at full width: %s",
                name.rpartition(".")[2],
                self._problem,
            )
            self.num_full_width += 1
            if adapted is None:
                return linear
            twin = TwinLinear(linear, NONE, self._dtype, adapted)
        self.linears.append(twin)
        return twin.module

    def _adapted(self, linear: Any, name: str) -> Callable[[torch.Tensor], None] | None:
        """Adds the adapter's part of ``linear`` to this rank's shard of its weight."""
        adapter = self._adapter
        if adapter is None:
            return None
        parent, _, leaf = name.rpartition(".")
        parts = getattr(self._model, "packed_modules_mapping", {}).get(leaf, [leaf])
        if name in adapter.module_names:  # The checkpoint has the fused layer, too.
            parts = [leaf]
        merged = {f"{parent}.{part}" for part in parts} & set(adapter.module_names)
        if not merged:
            return None
        self._merged |= merged
        # The loader of this moment: during a reload vLLM has others there, which count.
        load = linear.weight.weight_loader
        shard_ids = _QKV if isinstance(linear, QKVParallelLinear) else range(len(parts))

        def add_adapter(weight: torch.Tensor) -> None:
            delta = _loaded_shards(
                linear,
                load,
                (
                    (adapter.delta(f"{parent}.{part}"), shard_id if len(parts) > 1 else None)
                    for part, shard_id in zip(parts, shard_ids, strict=False)
                ),
            )
            weight.copy_(weight.float() + delta.to(weight.device))

        return add_adapter

    def _exit_model(self) -> Any:
        """The model whose norm and head drafts end in."""
        norm = self._adapter and self._adapter.final_norm()
        translator = self._adapter and self._adapter.translator()
        has_exit = norm is not None or translator is not None
        model = self._with_exit(norm, translator) if has_exit else self._model
        return model if self.head is None else with_head(model, self.head.module)

    def _with_exit(self, norm: torch.Tensor | None, translator: torch.Tensor | None) -> Any:
        """The model with the adapter's final norm and translator; everything else is shared."""
        backbone = copy.copy(self._model.model)
        twin_norm = backbone.norm if norm is None else self._own_norm(backbone.norm, norm)
        if translator is not None:
            weight = self._exit_weight(translator, backbone.norm.weight)
            twin_norm = TranslatedNorm(twin_norm, weight)
        backbone._modules = {**backbone._modules, "norm": twin_norm}
        model = copy.copy(self._model)
        model._modules = {**model._modules, "model": backbone}
        return model

    def _own_norm(self, target: nn.Module, norm: torch.Tensor) -> nn.Module:
        """The target's final norm with the adapter's weight."""
        twin_norm = copy.copy(target)
        weight = self._exit_weight(norm, target.weight)
        twin_norm._parameters = {**target._parameters, "weight": weight}
        return twin_norm

    def _exit_weight(self, values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
        """A parameter with the adapter's values, on the device and in the dtype of another."""
        weight = nn.Parameter(values.to(like, copy=True), requires_grad=False)
        self._exit_weights.append((weight, values))
        return weight

    def after_load(self) -> None:
        """Make what hangs on no hook; call it once, when the target's weights are there."""
        self._num_weight_changes = self._model.num_weight_changes
        for linear in self._all_linears():
            if not linear.is_made:
                self._make_late(linear)
        self._log()
        if self.kind != NONE:
            self._warn_if_slower()

    def _all_linears(self) -> list[TwinLinear]:
        return [*self.linears, *filter(None, [self.head])]

    def _make_late(self, linear: TwinLinear) -> None:
        """Make a weight whose hook was not called: some load formats process nothing."""
        if not linear.has_source:
            raise ValueError(
                "speculative_config: with this load_format vLLM leaves no weights to make a draft "
                "twin from. Set load_format='auto', or draft_quantization and draft_adapter to "
                "'none'."
            )
        linear.make()

    def _log(self) -> None:
        config = self._config.draft_adapter
        adapter = "" if config is None else f", with the adapter {config.digest}"
        shared = f"; {self.num_full_width} at full width" if self.num_full_width else ""
        logger.info_once(
            "LayerSkip's draft twin: %d linear layers%s (%s: %s)%s; extra memory: %d bytes of "
            "layers, %d bytes of LM head.",
            len(self.linears),
            adapter,
            self.kind,
            ", ".join(self.kernel_names),
            shared,
            self.num_bytes,
            self.num_head_bytes,
        )

    def refresh(self) -> None:
        """Make weights again if the target's may have changed since.

        On a CPU vLLM has dropped the full weights. There, weights change by being loaded, and the
        hooks have made the twin's already.
        """
        if self._num_weight_changes == self._model.num_weight_changes:
            return
        self._num_weight_changes = self._model.num_weight_changes
        for weight, values in self._exit_weights:
            weight.data.copy_(values)
        for linear in self._all_linears():
            if linear.has_source:
                linear.make()

    @property
    def num_bytes(self) -> int:
        """Extra memory of the twin's layers, final norm and translator on this rank."""
        own = sum(weight.nbytes for weight, _ in self._exit_weights)
        return own + sum(linear.method.num_bytes for linear in self.linears)

    @property
    def num_head_bytes(self) -> int:
        """Extra memory of its LM head on this rank."""
        return 0 if self.head is None else self.head.method.num_bytes

    @property
    def kernel_names(self) -> list[str]:
        return sorted({linear.method.kernel_name for linear in self.linears})

    @torch.inference_mode()
    def _warn_if_slower(self) -> None:
        """Compare the largest linear layer with the target's, for one token."""
        if self._dtype == torch.float32:
            logger.warning_once(
                "In float32 LayerSkip's draft twin is a reference: its weights have the values of "
                "%s and the width of float32, so it saves no time and no memory. Use dtype "
                "bfloat16 for speed.",
                self.kind,
            )
            return
        linear = max(self.linears, key=lambda linear: linear.shape[0] * linear.shape[1])
        device = next(linear.module.parameters()).device
        x = torch.randn(1, linear.shape[1], device=device).to(self._dtype)
        twin_s = _seconds(lambda: linear.module.quant_method.apply(linear.module, x))
        target_s = _seconds(lambda: linear.target.quant_method.apply(linear.target, x))
        if twin_s > SLOWER * target_s:
            logger.warning_once(
                "LayerSkip's draft twin is slower than the target's own layers here: one token "
                "takes %.3f ms in a linear layer of %s x %s in %s (%s), and %.3f ms at full width. "
                "Its kernel does not suit this machine; draft_quantization='none' may serve "
                "better.",
                twin_s * 1e3,
                *linear.shape,
                self.kind,
                linear.method.kernel_name,
                target_s * 1e3,
            )


class TranslatedNorm(nn.Module):
    """A final norm and the linear map behind it; called as vLLM's norms are."""

    def __init__(
        self,
        norm: nn.Module,
        translator: nn.Parameter,  # [H, H]
    ) -> None:
        super().__init__()
        self.norm = norm
        self.translator = translator

    def forward(
        self,
        hidden_states: torch.Tensor,  # [T, H]
        residual: torch.Tensor | None = None,  # [T, H]
    ) -> Any:
        """``[T, H]``, with a residual also the residual stream ``[T, H]``, as the norm has it."""
        if residual is None:
            return F.linear(self.norm(hidden_states), self.translator)
        normed, residual = self.norm(hidden_states, residual)
        return F.linear(normed, self.translator), residual


def _loaded_shards(
    linear: Any, load: Callable[..., None], parts: Iterator[tuple[torch.Tensor | None, Any]]
) -> torch.Tensor:
    """``[N, M]`` float32: this rank's shard of full weights, cut and placed by vLLM's own loader.

    The loader writes to the layer's own parameter, so that lends its place for a moment.
    """
    parameter = linear.weight
    own = parameter.data
    try:
        parameter.data = torch.zeros_like(own, dtype=torch.float32)
        for delta, shard_id in parts:
            if delta is not None:
                delta = delta.to(own.device)
                load(parameter, delta) if shard_id is None else load(parameter, delta, shard_id)
        return parameter.data
    finally:
        parameter.data = own


def _seconds(run: Callable[[], object]) -> float:
    """Seconds of one call: the least of many."""
    device_wide = torch.accelerator.is_available()
    run()  # A first call may compile, pack or tune.
    if device_wide:
        torch.accelerator.synchronize()
    best, end = float("inf"), time.perf_counter() + _TRIAL_S
    while True:
        start = time.perf_counter()
        run()
        if device_wide:
            torch.accelerator.synchronize()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best
