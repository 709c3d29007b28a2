# SPDX-License-Identifier: Apache-2.0
"""What the target said about each sample, kept from one epoch to the next.

The target is frozen, so it says the same each time. Its last states are kept in files, since in the
next epoch another process may get the sample; K/V of the layers that draft are not (they are
larger, and those layers run fast).

Shapes: B samples, T tokens, H hidden.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vllm_layerskip.files.whole import UNFINISHED


class Said(NamedTuple):
    """The target's last states, normed, ``[.., T, H]``, and its argmax ``[.., T]``."""

    states: torch.Tensor
    tokens: torch.Tensor


class TargetMemory:
    """Said by sample, a file each; a sample is told by its tokens and labels (padding is on the
    right)."""

    def __init__(self, folder: Path) -> None:
        """Takes a folder that all processes of a run share, and nobody else."""
        self._folder = folder

    def recall(self, inputs: Mapping[str, Any]) -> Said | None:
        """What the target said about a batch; None if a sample of it is new."""
        ids = inputs["input_ids"]
        files = [self._file(key) for key, _ in _samples(inputs)]
        if not all(file.exists() for file in files):
            return None
        known = [load_file(file) for file in files]
        longest, device = ids.shape[1], ids.device
        return Said(
            torch.stack([_padded(said["states"], longest) for said in known]).to(device),
            torch.stack([_padded(said["tokens"][:, None], longest)[:, 0] for said in known]).to(
                device
            ),
        )

    def keep(self, inputs: Mapping[str, Any], said: Said) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for row, (key, length) in enumerate(_samples(inputs)):
            own = {name: part[row, :length].cpu().clone() for name, part in said._asdict().items()}
            # Whole or not there: another process may read it, and a run may be killed.
            unfinished = self._folder / f"{UNFINISHED}-{os.getpid()}"
            save_file(own, unfinished)
            unfinished.replace(self._file(key))

    def forget(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, key: bytes) -> Path:
        return self._folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"


def _samples(inputs: Mapping[str, Any]) -> Iterator[tuple[bytes, int]]:
    """What tells each sample, and its length without padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    rows = torch.stack([ids, inputs["labels"]], 1).cpu()  # [B, 2, T]
    for row, length in zip(rows, lengths, strict=True):
        yield row[:, :length].numpy().tobytes(), length


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, length - len(rows)))
