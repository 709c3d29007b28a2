# SPDX-License-Identifier: Apache-2.0
"""Jobs that load a model, as they cross to the process or machine that does them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_layerskip.tuning.drafts import Draft
from vllm_layerskip.tuning.grid import DraftCell

USER_ERROR = "user_error"
"""The key of a mistake of the user, in place of a job's results."""


@dataclass(frozen=True)
class EngineSettings:
    """How the engines run; vLLM's defaults but for this."""

    model: str
    dtype: str = "auto"
    device: str = "cuda"
    max_model_len: int = 2048
    enforce_eager: bool = False
    draft_vocab: str | None = None
    """``draft_vocab`` of the request; None leaves it to the checkpoint."""
    kv_cache_memory_bytes: int | None = None
    draft_adapters: Mapping[str, str] = field(default_factory=dict)
    """The folder of each adapter, by the digest that a ``Draft`` names it with."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``LLM``; they override the others."""

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine."""
        return int(self.engine_args.get("tensor_parallel_size", 1))


@dataclass(frozen=True)
class Workload:
    """What the engines generate."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    repeats: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Workload:
        return cls(
            prompts=tuple(map(tuple, values["prompts"])),
            max_tokens=values["max_tokens"],
            stop_token_ids=tuple(values["stop_token_ids"]),
            batch_sizes=tuple(values["batch_sizes"]),
            repeats=values["repeats"],
        )


@dataclass(frozen=True)
class CellJob:
    """Cells to measure one after another, an engine for each."""

    cells: tuple[DraftCell, ...]
    engine: EngineSettings
    workload: Workload
    settings_digest: str
    """What the measurements carry."""

    def parts(self, num_cells: int) -> list[CellJob]:
        """Jobs of at most ``num_cells`` cells each."""
        starts = range(0, len(self.cells), num_cells)
        return [replace(self, cells=self.cells[start : start + num_cells]) for start in starts]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellJob:
        return cls(
            cells=tuple(DraftCell(Draft(*draft), tuple(cell)) for draft, cell in values["cells"]),
            engine=EngineSettings(**values["engine"]),
            workload=Workload.from_dict(values["workload"]),
            settings_digest=values["settings_digest"],
        )


@dataclass(frozen=True)
class AgreementJob:
    """Agreement statistics to make along a workload's greedy answers, a file for each draft."""

    engine: EngineSettings
    workload: Workload
    settings_digest: str
    """What the statistics carry."""
    exits: tuple[tuple[Draft, tuple[int, ...]], ...]
    """The exit layers of each draft."""
    draft_vocab: tuple[int, ...] | None
    generator: str
    """``vllm`` or ``transformers``: what writes the greedy answers."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AgreementJob:
        draft_vocab = values["draft_vocab"]
        return cls(
            engine=EngineSettings(**values["engine"]),
            workload=Workload.from_dict(values["workload"]),
            settings_digest=values["settings_digest"],
            exits=tuple((Draft(*draft), tuple(layers)) for draft, layers in values["exits"]),
            draft_vocab=None if draft_vocab is None else tuple(draft_vocab),
            generator=values["generator"],
        )
