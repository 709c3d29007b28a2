# SPDX-License-Identifier: Apache-2.0
"""What may be chosen: exit layers E, numbers of drafts K, and batch sizes. A cell is one (E, K).

Each draft (``drafts.py``) has a grid of its own: a twin may have all L layers, and an adapter is
for one E. A draft's cell is what one engine runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_layerskip.config.options import ALL
from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.drafts import OWN, Draft
from vllm_layerskip.tuning.settings import GridSettings
from vllm_layerskip.twins.adapter import DraftAdapter
from vllm_layerskip.twins.kinds import NONE

Cell = tuple[int, int]
"""(E, K)."""

PLAIN: Cell = (0, 0)
"""The (E, K) of plain decoding."""


class DraftCell(NamedTuple):
    """A cell of a draft's grid."""

    draft: Draft
    cell: Cell

    def __str__(self) -> str:
        if self.cell == PLAIN:
            return "plain"
        twin = f"{self.draft.name} " if self.draft.has_twin else ""
        return f"{twin}E={self.cell[0]} K={self.cell[1]}"


PLAIN_DECODING = DraftCell(OWN, PLAIN)


@dataclass(frozen=True)
class Grid:
    """What may be chosen of one draft."""

    exit_layers: tuple[int, ...]
    num_speculative_tokens: tuple[int, ...]
    batch_sizes: tuple[int, ...]

    @property
    def cells(self) -> list[Cell]:
        return [(e, k) for e in self.exit_layers for k in self.num_speculative_tokens]


def make_grids(
    settings: GridSettings, num_layers: int, adapters: Mapping[str, DraftAdapter]
) -> dict[Draft, Grid]:
    """The grid of each draft for a model with ``num_layers`` layers.

    Args:
        adapters: those of the settings, by the digests that drafts name them with.

    Raises:
        UserError: a range is malformed, or a draft has no exit layer in it.
    """
    num_drafts = _numbers("--num-speculative-tokens", settings.num_speculative_tokens)
    batch_sizes = _numbers("--batch-sizes", settings.batch_sizes)
    exit_layers = _exit_layers(settings, num_layers)
    digests = [*([NONE] if NONE in settings.draft_adapters else []), *adapters]
    drafts = itertools.product(dict.fromkeys(settings.draft_quantizations), digests)
    return {
        draft: Grid(
            _exit_layers_of(draft, exit_layers, num_layers, adapters, settings),
            num_drafts,
            batch_sizes,
        )
        for draft in itertools.starmap(Draft, drafts)
    }


def _exit_layers(settings: GridSettings, num_layers: int) -> tuple[int, ...]:
    """The exit layers of any draft."""
    may_be_all = any(kind != NONE for kind in settings.draft_quantizations)
    largest = num_layers if may_be_all else num_layers - 1
    text = settings.exit_layers or f"1-{largest}"
    numbers = ",".join(str(num_layers) if part == ALL else part for part in text.split(","))
    try:
        return _numbers("--exit-layers", numbers, largest)
    except UserError:
        only_with = "" if may_be_all else ", with --draft-quantization int4 or the like"
        raise UserError(
            f"--exit-layers {text} must be integers from 1 to {largest}, such as 2-4 or 1,2,8; "
            f"{ALL!r} stands for {num_layers}{only_with}."
        ) from None


def _exit_layers_of(
    draft: Draft,
    exit_layers: Sequence[int],
    num_layers: int,
    adapters: Mapping[str, DraftAdapter],
    settings: GridSettings,
) -> tuple[int, ...]:
    """Those that a draft may have: L for rounded weights only, and an adapter's own E."""
    first, last = 1, num_layers if draft.may_exit_last else num_layers - 1
    option = f"--draft-quantization {draft.quantization}"
    adapter = adapters.get(draft.adapter)
    if adapter is not None:
        option = f"--draft-adapter {adapter.path} with {option}"
        first = adapter.exit_layer or adapter.num_layers
        last = min(adapter.exit_layer or last, last)
    found = tuple(layer for layer in exit_layers if first <= layer <= last)
    if found:
        return found
    given = f"--exit-layers {settings.exit_layers or '(default)'}"
    valid = f"{first} to {last}" if first < last else str(first)
    fault = f"its exit layer may be {valid}, and {given} has none of those"
    if first > last:
        fault = f"it exits after {first} of {num_layers} layers, which needs rounded weights"
    raise UserError(
        f"{option}: {fault}. Change --exit-layers, --draft-quantization or --draft-adapter."
    )


def _numbers(option: str, text: str, largest: int | None = None) -> tuple[int, ...]:
    """``2-4,8`` as numbers, ascending."""
    valid = f"integers from 1 to {largest}" if largest else "integers of at least 1"
    wrong = UserError(f"{option} {text} must be {valid}, such as 2-4 or 1,2,8.")
    numbers: set[int] = set()
    for part in text.split(","):
        try:
            begin, end = _ends(part)
        except ValueError:
            raise wrong from None
        if not 1 <= begin <= end <= (largest or end):
            raise wrong
        numbers.update(range(begin, end + 1))
    return tuple(sorted(numbers))


def _ends(part: str) -> tuple[int, int]:
    first, dash, last = part.strip().partition("-")
    return int(first), int(last if dash else first)
