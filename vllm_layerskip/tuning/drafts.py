# SPDX-License-Identifier: Apache-2.0
"""Whose weights draft: the target's own layers, or a twin of them (``worker/draft_twin.py``)."""

from __future__ import annotations

from typing import NamedTuple

from vllm_layerskip.twins.kinds import NONE


class Draft(NamedTuple):
    """Weights that draft. It is part of what a measured cell is."""

    quantization: str = NONE
    """One of ``twins.kinds.CHOICES``."""
    adapter: str = NONE
    """The digest of an adapter's content, so that a moved folder is the same one."""

    @property
    def has_twin(self) -> bool:
        """Whether they are not the target's own."""
        return self != OWN

    @property
    def may_exit_last(self) -> bool:
        """Whether all L layers may draft."""
        return self.quantization != NONE

    @property
    def name(self) -> str:
        """For files and tables: ``int4``, ``int4-ADAPTER``, ``none``."""
        parts = [part for part in self if part != NONE]
        return "-".join(parts) or NONE


OWN = Draft()
"""The target's own layers."""


def agreement_name(draft: Draft) -> str:
    """The file of a draft's agreement statistics."""
    return "agreement.npz" if draft == OWN else f"agreement-{draft.name}.npz"
