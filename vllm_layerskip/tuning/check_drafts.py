# SPDX-License-Identifier: Apache-2.0
"""The draft twins that a user asks for, checked against the model before its weights load."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.evaluation.settings import Checkpoint, TwinSettings
from vllm_layerskip.evaluation.twin import check_twin
from vllm_layerskip.files.unreadable import unreadable
from vllm_layerskip.tuning.settings import GridSettings
from vllm_layerskip.twins.adapter import DraftAdapter
from vllm_layerskip.twins.kinds import NONE


def check_drafts(settings: GridSettings, model: str) -> dict[str, DraftAdapter]:
    """Check the kinds and the adapters of the settings; the adapters come by their digests.

    Raises:
        UserError: the model may have no such twin, or an adapter does not fit it.
    """
    kinds = [kind for kind in settings.draft_quantizations if kind != NONE]
    folders = [folder for folder in settings.draft_adapters if folder != NONE]
    if not kinds and not folders:
        return {}
    config = _hf_config(model)
    for kind in kinds:
        check_twin(TwinSettings(kind), _checkpoint(model), config)
    return _by_digest(
        check_twin(TwinSettings(NONE, folder), _checkpoint(model), config) for folder in folders
    )


def read_adapter(folder: str, model: str) -> DraftAdapter | None:
    """An adapter of a model, checked again on the machine that merges it.

    Raises:
        UserError: it does not fit.
    """
    return check_twin(TwinSettings(NONE, folder), _checkpoint(model), _hf_config(model))


def _by_digest(adapters: Iterable[DraftAdapter | None]) -> dict[str, DraftAdapter]:
    return {adapter.digest: adapter for adapter in adapters if adapter is not None}


def _checkpoint(model: str) -> Checkpoint:
    return Checkpoint("--model", model, Path(model).name)


def _hf_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except unreadable() as error:
        raise UserError(
            f"--model {model}: its config.json cannot be read ({first_line(error)}). Correct it, "
            "or give another checkpoint."
        ) from None
