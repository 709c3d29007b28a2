# SPDX-License-Identifier: Apache-2.0
"""Attention of the layers that draft, as it is in the engine.

There a draft attends to K/V that the *target* wrote at the positions before this draft step, and to
its own K/V only at the positions of the step itself. Training with its own K/V everywhere would
teach it something else. So the target's pass records the K/V of layers 0..E-1, and the drafts' pass
cuts the text into steps of K positions: a position sees the target's K/V before its step, and the
drafts' K/V within it.

A model of transformers hands each attention a cache, which takes the new K/V and returns those to
attend to. ``TargetKV`` puts one in and widens the mask to ``[T, 2T]``. This happens within the
layer, where gradient checkpointing calls it again.

Shapes: B samples, T tokens, H heads of K/V, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each ``[B, H, T, D]``."""


class _Cache:
    """What an attention takes for a cache: ``update`` returns the K/V to attend to."""

    def __init__(self, update: Callable[[torch.Tensor, torch.Tensor], KV]) -> None:
        self._update = update

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_args: Any, **_kwargs: Any) -> KV:
        return self._update(keys, values)


class TargetKV:
    """K/V of layers 0..E-1 as the target writes them, for one batch."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Takes the layers that draft; each has its attention in ``self_attn``."""
        self._attentions: list[nn.Module] = [layer.self_attn for layer in layers]  # type: ignore[misc]
        self._kv: dict[nn.Module, KV] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within this block the K/V of the pass are kept.

        Raises:
            TypeError: an attention did not show its K/V.
        """
        self._kv.clear()

        def cache_of(attention: nn.Module) -> _Cache:
            def record(keys: torch.Tensor, values: torch.Tensor) -> KV:
                self._kv[attention] = keys.detach(), values.detach()
                return keys, values

            return _Cache(record)

        with self._hooked(
            lambda attention, kwargs: kwargs | {"past_key_values": cache_of(attention)}
        ):
            yield
        for attention in self._attentions:
            if attention not in self._kv:
                raise TypeError(
                    f"{type(attention).__name__} keeps no K/V in past_key_values, so draft "
                    "adapters cannot be trained for such a model."
                )

    @contextmanager
    def attended(self, num_speculative_tokens: int, offset: int) -> Iterator[None]:
        """Within this block positions attend to the recorded K/V before their draft step.

        Args:
            num_speculative_tokens: K, the length of a step.
            offset: steps begin at the positions ``offset + i * K``.
        """
        mask = _Mask(num_speculative_tokens, offset)

        def cache_of(attention: nn.Module) -> _Cache:
            before_keys, before_values = self._kv[attention]

            def join(keys: torch.Tensor, values: torch.Tensor) -> KV:
                return (
                    torch.cat([before_keys.to(keys.dtype), keys], 2),
                    torch.cat([before_values.to(values.dtype), values], 2),
                )

            return _Cache(join)

        def changed(attention: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
            eager = attention.config._attn_implementation == "eager"  # type: ignore[union-attr]
            num_tokens = self._kv[attention][0].shape[2]
            device = self._kv[attention][0].device
            own = kwargs["attention_mask"]
            return kwargs | {
                "past_key_values": cache_of(attention),
                "attention_mask": mask.widen(own, num_tokens, device, eager),
            }

        with self._hooked(changed):
            yield

    @contextmanager
    def _hooked(
        self, change: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
    ) -> Iterator[None]:
        handles = [
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: (args, change(module, kwargs)), with_kwargs=True
            )
            for attention in self._attentions
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Mask:
    """Masks ``[.., T, 2T]``: the target's K/V, then the drafts'."""

    def __init__(self, num_speculative_tokens: int, offset: int) -> None:
        self._step_length = num_speculative_tokens
        self._offset = offset
        # Layers with the same mask share the widened one.
        self._last: tuple[torch.Tensor | None, torch.Tensor] | None = None

    def widen(
        self, mask: torch.Tensor | None, num_tokens: int, device: torch.device, eager: bool
    ) -> torch.Tensor:
        """``mask [.., T, T]``, with True or 0 where a position sees another; None: all before."""
        if self._last is None or self._last[0] is not mask:
            self._last = mask, self._widened(mask, num_tokens, device, eager)
        return self._last[1]

    def _widened(
        self, mask: torch.Tensor | None, num_tokens: int, device: torch.device, eager: bool
    ) -> torch.Tensor:
        positions = torch.arange(num_tokens, device=device)
        steps = torch.div(positions - self._offset, self._step_length, rounding_mode="floor")
        is_past = steps[:, None] > steps[None, :]
        is_own = (steps[:, None] == steps[None, :]) & (positions[:, None] >= positions[None, :])
        seen = torch.cat([is_past, is_own], 1)[None, None]
        if mask is not None and mask.dtype == torch.bool:
            return torch.cat([mask, mask], -1) & seen
        if mask is not None:
            return torch.cat([mask, mask], -1).masked_fill(~seen, torch.finfo(mask.dtype).min)
        if eager:  # It adds its mask.
            return torch.zeros(seen.shape, device=device).masked_fill(~seen, float("-inf"))
        return seen
