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
Change = Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
"""An attention's arguments, changed."""


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
        self._change: Change | None = None
        for attention in self._attentions:
            attention.register_forward_pre_hook(self._hook, with_kwargs=True)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within this block the K/V of the pass are kept.

        Raises:
            TypeError: an attention did not show its K/V.
        """

        def record(attention: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
            def keep(keys: torch.Tensor, values: torch.Tensor) -> KV:
                self._kv[attention] = keys.detach(), values.detach()
                return keys, values

            return kwargs | {"past_key_values": _Cache(keep)}

        self.forget()
        self._change = record
        try:
            yield
        finally:
            self._change = None
        for attention in self._attentions:
            if attention not in self._kv:
                raise TypeError(
                    f"{type(attention).__name__} keeps no K/V in past_key_values, so draft "
                    "adapters cannot be trained for such a model."
                )

    def attend(self, num_speculative_tokens: int, offset: int) -> None:
        """From now on positions attend to the recorded K/V before their draft step.

        Until the next recording, and not for one forward pass: gradient checkpointing runs the
        layers again in the backward pass.

        Args:
            num_speculative_tokens: K, the length of a step.
            offset: steps begin at the positions ``offset + i * K``.
        """
        mask = _Mask(num_speculative_tokens, offset)

        def join(attention: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
            before_keys, before_values = self._kv[attention]

            def joined(keys: torch.Tensor, values: torch.Tensor) -> KV:
                return (
                    torch.cat([before_keys.to(keys.dtype), keys], 2),
                    torch.cat([before_values.to(values.dtype), values], 2),
                )

            eager = attention.config._attn_implementation == "eager"  # type: ignore[union-attr]
            seen = mask.widen(
                kwargs["attention_mask"], before_keys.shape[2], before_keys.device, eager
            )
            return kwargs | {"past_key_values": _Cache(joined), "attention_mask": seen}

        self._change = join

    def forget(self) -> None:
        """Let go of the K/V: positions attend to their own again."""
        self._kv.clear()
        self._change = None

    def _hook(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs if self._change is None else self._change(attention, kwargs)


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
