# SPDX-License-Identifier: Apache-2.0
"""The processes of a table: which mode runs with which drafts, in which order.

A table of several rounds runs A B A B: every mode once, then every mode again, each time in a new
process with a new engine. So a machine that gets slower or faster meanwhile does it to all modes
alike, and a mode is compared with the plain decoding of its own round.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.engines.settings import ALL_LAYERS, Settings, exit_layer
from vllm_layerskip.errors import UserError
from vllm_layerskip.twins.kinds import CHOICES, NONE

MODES_WITHOUT_DRAFTS = ("plain", "early-exit", "transformers")


@dataclass(frozen=True)
class ModeProcess:
    """One process of a table: a mode, and the settings with its drafts."""

    mode: str
    settings: Settings

    @property
    def name(self) -> str:
        settings = self.settings
        parts = [self.mode]
        if self.mode == "layerskip":
            parts.append(f"e{settings.exit_layer}")
        parts.append(f"k{settings.num_speculative_tokens}")
        if settings.draft_quantization != NONE and self.mode == "layerskip":
            parts.append(settings.draft_quantization)
        if settings.round > 1:
            parts.append(f"round{settings.round}")
        return "-".join(parts)


@dataclass(frozen=True)
class Drafts:
    """One value of ``--drafts``."""

    exit_layer: int | str
    num_speculative_tokens: int
    kind: str = NONE
    acceptance_length: float | None = None

    def __str__(self) -> str:
        parts = [self.exit_layer, self.num_speculative_tokens]
        if self.kind != NONE or self.acceptance_length is not None:
            parts.append(self.kind)
        if self.acceptance_length is not None:
            parts.append(f"{self.acceptance_length:g}")
        return ":".join(map(str, parts))

    def of(self, settings: Settings) -> Settings:
        """The table's settings with these drafts.

        Raises:
            UserError: acceptance is set, and nobody says to which length.
        """
        all_layers = settings.model_shape().num_layers
        layers = all_layers if self.exit_layer == ALL_LAYERS else int(self.exit_layer)
        length = self.acceptance_length
        if length is None and settings.model is None:
            if layers != settings.exit_layer:
                raise UserError(
                    f"--drafts {self.exit_layer}:{self.num_speculative_tokens}: a shape has no "
                    "acceptance of its own. Add the kind and the acceptance length, such as "
                    f"{self.exit_layer}:{self.num_speculative_tokens}:{self.kind}:3.0"
                )
            settings = settings.with_num_speculative_tokens(self.num_speculative_tokens)
            length = settings.synthetic_acceptance_length
        return replace(
            settings,
            exit_layer=layers,
            num_speculative_tokens=self.num_speculative_tokens,
            draft_quantization=self.kind,
            synthetic_acceptance_length=length,
        )


def drafts(text: str) -> Drafts:
    """The type of ``--drafts``: ``E:K``, ``E:K:KIND`` or ``E:K:KIND:LENGTH``.

    Raises:
        ArgumentTypeError: it is none of these.
    """
    try:
        layers, num_drafts, *rest = text.split(":")
        kind = rest[0] if rest else NONE
        length = float(rest[1]) if rest[1:] else None
        if kind in CHOICES and int(num_drafts) > 0 and not rest[2:]:
            return Drafts(exit_layer(layers), int(num_drafts), kind, length)
    except (ValueError, argparse.ArgumentTypeError):
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} must be E:K, E:K:KIND or E:K:KIND:LENGTH, such as 8:12:int4:9.0 or all:4:int4; "
        f"KIND is one of {', '.join(CHOICES)}"
    )


def mode_processes(
    modes: Sequence[str],
    settings: Settings,
    num_drafts: Sequence[int],
    kinds: Sequence[str] = (NONE,),
) -> list[ModeProcess]:
    """Modes without drafts once, the others once for each K, ``layerskip`` for each kind, too."""
    table = []
    for mode in modes:
        for k in num_drafts[:1] if mode in MODES_WITHOUT_DRAFTS else num_drafts:
            with_k = settings.with_num_speculative_tokens(k)
            for kind in kinds if mode == "layerskip" else (NONE,):
                one = ModeProcess(mode, replace(with_k, draft_quantization=kind))
                _require_possible(one)
                table.append(one)
    return table


def draft_processes(
    modes: Sequence[str], settings: Settings, all_drafts: Sequence[Drafts]
) -> list[ModeProcess]:
    """The processes of ``--drafts``: ``layerskip`` once for each, other modes with the first."""
    twice = [drafts for drafts in all_drafts if all_drafts.count(drafts) > 1]
    if twice:
        raise UserError(f"--drafts names {twice[0]} twice. Leave one out.")
    several = [one.of(settings) for one in all_drafts]
    table = []
    for mode in modes:
        for one in several if mode == "layerskip" else several[:1]:
            kind = one.draft_quantization if mode == "layerskip" else NONE
            process = ModeProcess(mode, replace(one, draft_quantization=kind))
            _require_possible(process)
            table.append(process)
    return table


def in_rounds(table: Sequence[ModeProcess], num_rounds: int) -> list[ModeProcess]:
    """The table as often as asked for: A B A B."""
    return [
        replace(one, settings=replace(one.settings, round=number))
        for number in range(1, num_rounds + 1)
        for one in table
    ]


def _require_possible(one: ModeProcess) -> None:
    layers, num_layers = one.settings.exit_layer, one.settings.model_shape().num_layers
    if one.mode != "layerskip" or layers < num_layers:
        return
    if layers > num_layers or one.settings.draft_quantization == NONE:
        raise UserError(
            f"--exit-layer={layers}: layerskip drafts with 1 to {num_layers - 1} of this model's "
            f"{num_layers} layers, or with all ({num_layers}) and one of --draft-quantization "
            f"{', '.join(kind for kind in CHOICES if kind != NONE)}."
        )
