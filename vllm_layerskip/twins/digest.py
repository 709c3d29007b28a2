# SPDX-License-Identifier: Apache-2.0
"""A short digest that tells one base checkpoint from another, its weights included.

A draft adapter fits the weights that it was trained on. Shapes do not tell a model from its
fine-tuned sibling, and reading all weights of a large model takes minutes. So the digest takes the
name, dtype and shape of every tensor, and a few evenly spaced pieces of its values. Tensors go in
by name: how a checkpoint is cut into files does not matter. An edit of a few values that lies
between the pieces is not seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PIECES = 8
"""Pieces of a tensor."""
_PIECE_BYTES = 512
_HEX_DIGITS = 16
_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_REMEDY = "Copy or download the checkpoint again."


def checkpoint_digest(folder: Path) -> str | None:
    """16 hex digits for the weights in ``folder``; None if it has no safetensors files.

    Raises:
        ValueError: a file or the index of files cannot be read; the message names it.
    """
    digests: dict[str, bytes] = {}
    for file in _weight_files(folder):
        try:
            digests.update(_tensor_digests(file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The weight file {file} cannot be read: {error}. {_REMEDY}") from None
    if not digests:
        return None
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()[
        :_HEX_DIGITS
    ]


def _weight_files(folder: Path) -> list[Path]:
    """The files that a checkpoint's loader reads: those of its index, if there is one."""
    index = folder / _INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / str(name) for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The index of weight files {index} cannot be read: {error!r}. {_REMEDY}"
            ) from None
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    return sorted(folder.glob("*.safetensors"))


def _tensor_digests(file: Path) -> Iterator[tuple[str, bytes]]:
    """The digest of each tensor of a file, by name."""
    with file.open("rb") as opened:
        header, start = _read_header(opened)
        for name, entry in header.items():
            if name == "__metadata__":
                continue  # Says which tool wrote the file.
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(
                json.dumps([name, entry["dtype"], entry["shape"], end - begin]).encode()
            )
            for offset in _offsets(end - begin):
                opened.seek(start + begin + offset)
                piece = opened.read(min(_PIECE_BYTES, end - begin - offset))
                if len(piece) < min(_PIECE_BYTES, end - begin):
                    raise ValueError(f"it ends inside of {name}")
                digest.update(piece)
            yield name, digest.digest()


def _read_header(opened: BinaryIO) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its values begin."""
    num_bytes = int.from_bytes(opened.read(8), "little")
    if not 0 < num_bytes <= _MOST_HEADER_BYTES:
        raise ValueError("it does not begin with a header")
    header = json.loads(opened.read(num_bytes))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + num_bytes


def _offsets(num_bytes: int) -> list[int]:
    """Where a tensor's pieces begin: evenly spaced, the first and the last values among them."""
    last = max(num_bytes - _PIECE_BYTES, 0)
    return sorted({last * index // (_PIECES - 1) for index in range(_PIECES)})
