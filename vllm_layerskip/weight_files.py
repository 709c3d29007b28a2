# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint's weight files are whole, looked at before an engine starts.

vLLM reads them minutes later, in another process, and what it then reports of a file that was
cut short does not name the file. Only headers are read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"

_REMEDY = "Copy or download the checkpoint again."


def check_weight_files(folder: Path) -> None:
    """Check the safetensors files of a checkpoint in a local folder.

    Raises:
        ValueError: a file is damaged, cut short, or listed in the index and not there; the
            message names it.
    """
    from safetensors import SafetensorError, safe_open

    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass  # Opening compares the header with the file's length.
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The weight file {file} cannot be read: {error}. {_REMEDY}") from None


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / INDEX_NAME
    if not index.exists():
        yield from sorted(folder.glob("*.safetensors"))
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        yield from (folder / str(name) for name in sorted(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The index of weight files {index} cannot be read: {error!r}. {_REMEDY}"
        ) from None
