# SPDX-License-Identifier: Apache-2.0
"""The ``layerskip`` block of a checkpoint's config.json, which is written whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError, first_line
from vllm_layerskip.files.unreadable import unreadable
from vllm_layerskip.files.whole import whole_file, write_json
from vllm_layerskip.tuning.schedule import Choice

BACKUP_SUFFIX = ".before-tune"

_TWIN_KEYS = ("draft_quantization", "draft_adapter")


def read_config(model: str) -> dict[str, Any]:
    """A checkpoint's config.json: a folder's file as it is, a hub name's through transformers.

    Raises:
        UserError: there is no such checkpoint, or its config.json is no JSON object.
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
    except unreadable() as error:
        raise UserError(
            f"--model {model}: there is no such folder, and no such checkpoint on the model hub "
            f"could be read ({first_line(error)}). Correct the path or the name."
        ) from None


def tuned_block(
    block: object, choice: Choice, tuning: Mapping[str, Any], adapter: str | None = None
) -> dict[str, Any]:
    """The block with the choice in it; its other keys stay.

    Args:
        block: the checkpoint's block, if it has one.
        tuning: what the choice was found with.
        adapter: the chosen draft's adapter, if it lies in the checkpoint's folder: relative to it.
    """
    kept = dict(block) if isinstance(block, dict) else {}
    for key in _TWIN_KEYS:
        kept.pop(key, None)  # Another choice's.
    return {
        **kept,
        **choice.to_dict(),
        **({} if adapter is None else {"draft_adapter": adapter}),
        "tuning": dict(tuning),
    }


def path_in_checkpoint(model: str, path: str) -> str | None:
    """``path`` relative to a checkpoint's folder; None if it lies elsewhere."""
    folder, inside = Path(model).resolve(), Path(path).expanduser().resolve()
    if not folder.is_dir() or folder == inside or not inside.is_relative_to(folder):
        return None
    return inside.relative_to(folder).as_posix()


def check_writable(path: Path, option: str) -> None:
    """Find out before anything is measured whether ``path`` can be written at the end.

    Args:
        option: what names ``path``, for the message.

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
    try:
        if kept is not None and not kept.exists():
            _copy_whole(path, kept)
        write_json(path, config, indent=2)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}). Give --output FILE, or "
            "--dry-run and add the printed block to config.json by hand."
        ) from None
    return kept


def _copy_whole(source: Path, target: Path) -> None:
    with whole_file(target) as draft:
        shutil.copyfile(source, draft)
    shutil.copystat(source, target)  # Last: ``source`` may be read-only.
