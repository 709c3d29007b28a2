# SPDX-License-Identifier: Apache-2.0
"""The ``layerskip`` block of a checkpoint's config.json: written so that no half file is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_layerskip.config.options import SCHEDULE
from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.schedule import Choice

BACKUP_SUFFIX = ".before-tune"


def read_config(model: str) -> dict[str, Any]:
    """A checkpoint's config.json: of a folder as it stands, of a hub name through transformers.

    Raises:
        UserError: there is no such checkpoint.
    """
    path = Path(model) / "config.json"
    if not Path(model).exists():
        return _hub_config(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {model}: its config.json cannot be read ({error}). Give a checkpoint's "
            "folder, or a name on the model hub."
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"--model {model}: its config.json is no JSON object. Correct it.")
    return config


def _hub_config(model: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {model}: there is no such folder, and no such checkpoint on the model hub "
            f"could be read ({reason}). Correct the path or the name."
        ) from None


def tuned_block(block: object, choice: Choice, tuning: Mapping[str, Any]) -> dict[str, Any]:
    """The block with the choice in it; what else it said stays.

    Args:
        tuning: what the choice was found with.
    """
    return {
        **(block if isinstance(block, dict) else {}),
        "exit_layer": choice.exit_layer,
        "num_speculative_tokens": choice.num_speculative_tokens,
        SCHEDULE: [list(entry) for entry in choice.schedule],
        "tuning": dict(tuning),
    }


def check_writable(path: Path, option: str) -> None:
    """Find out before anything is measured whether ``path`` can be written at the end.

    Raises:
        UserError: it cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(0, "this is a folder", str(path))
    except OSError as error:
        raise UserError(
            f"{option}: {path} cannot be written ({error.strerror or error}). Give --output FILE "
            "to write the changed config.json somewhere else, or --dry-run to write none."
        ) from None


def write_config(path: Path, config: Mapping[str, Any], backup: bool) -> Path | None:
    """Replace ``path`` in one step.

    Args:
        backup: keep what was there before the first tuning; a later one leaves that copy alone.

    Returns:
        The backup, if there is one.

    Raises:
        UserError: it cannot be written.
    """
    kept = path.with_name(path.name + BACKUP_SUFFIX) if backup and path.exists() else None
    draft: Path | None = None
    try:
        if kept is not None and not kept.exists():
            _copy_whole(path, kept)
        handle, name = tempfile.mkstemp(prefix=".config-", suffix=".json", dir=path.parent)
        draft = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        else:
            draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        if draft is not None:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}). Give --output FILE, or "
            "--dry-run and add the printed block to config.json by hand."
        ) from None
    return kept


def _copy_whole(source: Path, target: Path) -> None:
    draft = target.with_name(f".{target.name}")
    shutil.copy2(source, draft)
    draft.replace(target)
