# SPDX-License-Identifier: Apache-2.0
"""What may be chosen: exit layers E, numbers of drafts K, and batch sizes. A cell is one (E, K)."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.settings import GridSettings

Cell = tuple[int, int]
"""(E, K)."""

PLAIN: Cell = (0, 0)
"""The (E, K) of plain decoding."""


@dataclass(frozen=True)
class Grid:
    """What may be chosen."""

    exit_layers: tuple[int, ...]
    num_speculative_tokens: tuple[int, ...]
    batch_sizes: tuple[int, ...]

    @property
    def cells(self) -> list[Cell]:
        return [(e, k) for e in self.exit_layers for k in self.num_speculative_tokens]


def make_grid(settings: GridSettings, num_layers: int) -> Grid:
    """The grid of a model with ``num_layers`` layers.

    Raises:
        UserError: a range is malformed, or an exit layer is not in the model.
    """
    last = num_layers - 1
    exit_layers = settings.exit_layers or f"1-{last}"
    return Grid(
        exit_layers=_numbers("--exit-layers", exit_layers, last),
        num_speculative_tokens=_numbers(
            "--num-speculative-tokens", settings.num_speculative_tokens
        ),
        batch_sizes=_numbers("--batch-sizes", settings.batch_sizes),
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
