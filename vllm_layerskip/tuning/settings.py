# SPDX-License-Identifier: Apache-2.0
"""What a user asks of a tuning run; ``vllm-layerskip tune --help`` explains each value.

Importing this module is cheap: the command line takes its defaults from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_layerskip.twins.kinds import NONE

ALL = -1
"""``num_measured`` for a full sweep."""

DEFAULT_MEASURED = 4
"""``num_measured`` where costs are measured too."""


@dataclass(frozen=True)
class GridSettings:
    """What may be chosen: numbers such as ``2-8`` or ``2,4,8``."""

    exit_layers: str | None = None
    """``all`` is L; None for 1 to L - 1, and L where a twin of all layers may draft."""
    num_speculative_tokens: str = "1-8"
    batch_sizes: str = "1"
    draft_quantizations: tuple[str, ...] = (NONE,)
    """Kinds of numbers that drafts compute with: some of ``twins.kinds.CHOICES``."""
    draft_adapters: tuple[str, ...] = (NONE,)
    """Folders of adapters for the layers that draft; ``none`` for drafts without one."""


@dataclass(frozen=True)
class PromptSettings:
    """Prompts, and how long their answers may be."""

    paths: tuple[str, ...]
    """Files, folders and patterns."""
    text_field: str | None = None
    """The key of a prompt's text; None for the usual ones."""
    num_prompts: int = 32
    max_prompt_tokens: int = 1024
    max_tokens: int = 128
    chat: bool = False


@dataclass(frozen=True)
class EngineRequest:
    """How the engines run, as far as the user says so."""

    dtype: str | None = None
    """None for ``float32`` on a CPU, else ``auto``."""
    device: str | None = None
    """``cuda`` or ``cpu``; None for ``cuda`` if there is a GPU."""
    draft_vocab: str | None = None
    enforce_eager: bool = False
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuringSettings:
    """What is measured, how often, and what is taken from elsewhere."""

    num_measured: int | None = None
    """Cells besides those that costs are fitted to; ``ALL`` for the whole grid; None for
    ``DEFAULT_MEASURED``, or 0 with ``hardware``."""
    hardware: str | None = None
    """A GPU whose roofline gives the costs; None to measure them."""
    repeats: int = 3
    rounds: int = 1
    cells_per_process: int = 1
    generator: Literal["vllm", "transformers"] | None = None
    """None for ``vllm``, or ``transformers`` with ``hardware``."""
    agreement: Path | None = None
    """Statistics of an earlier run; None to make them."""


@dataclass(frozen=True)
class RaySettings:
    """The Ray cluster that measures."""

    address: str | None = None
    """None for the cluster of ``RAY_ADDRESS``, or this machine."""
    accelerator_type: str | None = None


@dataclass(frozen=True)
class OutputSettings:
    """Where results go."""

    results: Path | None = None
    """None for ``tune-MODEL``."""
    map: Path | None = None
    """None for ``map.png`` in ``results``."""
    config: Path | None = None
    """None for the ``config.json`` of the checkpoint."""
    dry_run: bool = False
    """Change no ``config.json``."""


@dataclass(frozen=True)
class TuneSettings:
    """A tuning run."""

    model: str
    """A checkpoint's folder, or a name on the model hub."""
    prompts: PromptSettings
    grid: GridSettings = GridSettings()
    engine: EngineRequest = EngineRequest()
    measuring: MeasuringSettings = MeasuringSettings()
    ray: RaySettings | None = None
    """None to measure in processes of this machine."""
    output: OutputSettings = OutputSettings()
