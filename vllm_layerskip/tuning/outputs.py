# SPDX-License-Identifier: Apache-2.0
"""Where a run's results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.checkpoint_block import check_writable
from vllm_layerskip.tuning.drafts import Draft, agreement_name
from vllm_layerskip.tuning.settings import OutputSettings

_MAP_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Outputs:
    """Paths that can be written."""

    results: Path
    map: Path
    config: Path | None
    """None: no config.json is changed."""
    into_checkpoint: bool
    """Whether ``config`` is the checkpoint's own."""

    @property
    def report(self) -> Path:
        return self.results / "report.json"

    def agreement(self, draft: Draft) -> Path:
        return self.results / agreement_name(draft)

    @property
    def logs(self) -> Path:
        return self.results / "logs"


def choose_outputs(settings: OutputSettings, model: str) -> Outputs:
    """Resolve and check the paths, and make the results folder.

    Raises:
        UserError: one of them cannot be written.
    """
    folder = Path(model)
    config = settings.config
    if config is not None:
        check_writable(config, "--output")
    elif folder.is_dir() and not settings.dry_run:
        config = folder / "config.json"
        check_writable(config, f"--model {model}")
    name = folder.resolve().name if folder.is_dir() else folder.name
    results = settings.results or Path(f"tune-{name}")
    _make_folder(results)
    drawing = settings.map or results / "map.png"
    if drawing.suffix not in _MAP_SUFFIXES:
        raise UserError(f"--map {drawing} must end with .png, .svg or .pdf.")
    check_writable(drawing, "--map")
    return Outputs(
        results=results,
        map=drawing,
        config=config,
        into_checkpoint=config is not None and settings.config is None,
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {path}: {error.strerror}. Choose another folder.") from None
