# SPDX-License-Identifier: Apache-2.0
"""The draft adapters that the package ships for the example model: every folder in ``drafts/``."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from vllm_layerskip.files.whole import write_json
from vllm_layerskip.twins.adapter_config import CONFIG_NAME, RECORD_NAME

FOLDER = "drafts"
"""In the package and in the example's folder."""
SHIPPED = Path(__file__).parent / FOLDER


def shipped_drafts() -> list[Path]:
    """The folders of adapters, by name."""
    return sorted(file.parent for file in SHIPPED.glob(f"*/{CONFIG_NAME}"))


def digest_of_drafts() -> str:
    """SHA-256 over names and contents: a release with other drafts is another content."""
    digest = hashlib.sha256()
    for draft in shipped_drafts():
        for file in sorted(path for path in draft.rglob("*") if path.is_file()):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(SHIPPED).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()


def copy_drafts(folder: Path, weights_digest: str) -> list[str]:
    """Copy each draft to ``folder/drafts/NAME``.

    A draft is refused at start if it was trained on other weights. Here the user gave the weights
    (``--from``), and drafts are verified in any case: the record then names them, and keeps the
    digest of those that it was trained on.

    Args:
        weights_digest: of the checkpoint in ``folder``.

    Returns:
        The names of all drafts.
    """
    for draft in shipped_drafts():
        copied = folder / FOLDER / draft.name
        shutil.copytree(draft, copied, copy_function=shutil.copyfile)
        _fit_record(copied / RECORD_NAME, weights_digest)
    return [draft.name for draft in shipped_drafts()]


def _fit_record(file: Path, weights_digest: str) -> None:
    if not file.exists():
        return
    record = json.loads(file.read_text(encoding="utf-8"))
    trained_on = record.get("base_digest")
    if trained_on is not None and trained_on != weights_digest:
        write_json(file, {**record, "base_digest": weights_digest, "trained_on_digest": trained_on})
