# SPDX-License-Identifier: Apache-2.0
"""Checks that a checkpoint's weight files are whole and bring every weight.

The files' headers are read before an engine starts. vLLM reads the files minutes later, in another
process, and its error for a file that was cut short does not name the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"

_REMEDY = "Copy or download the checkpoint again."


def check_weight_files(folder: Path) -> None:
    """Check the safetensors files of a checkpoint in a local folder.

    Raises:
        ValueError: a file is damaged, cut short, or listed in the index but missing; the
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


def missing_weights(
    parameter_names: Iterable[str],
    packed_modules: Mapping[str, Sequence[str]],
    loaded_names: Set[str],
    checkpoint_names: Set[str],
) -> list[str]:
    """Weights that a model needs and a checkpoint did not bring.

    vLLM's own check leaves out every linear layer, and counts a fused weight as loaded once one
    of its parts was.

    Args:
        parameter_names: the model's.
        packed_modules: by name of a fused module, the names of its parts in the checkpoint.
        loaded_names: the parameters that got a value.
        checkpoint_names: the weights that the checkpoint brought, by its own names.
    """
    missing: list[str] = []
    for name in parameter_names:
        prefix, module, leaf = _split(name)
        parts = [f"{prefix}{part}.{leaf}" for part in packed_modules.get(module, ())]
        absent = [part for part in parts if part not in checkpoint_names]
        if name not in loaded_names:
            missing += absent or [name]
        elif 0 < len(absent) < len(parts):
            missing += absent
    return missing


def _split(name: str) -> tuple[str, str, str]:
    """``("model.layers.0.mlp.", "gate_up_proj", "weight")``"""
    path, _, leaf = name.rpartition(".")
    prefix, dot, module = path.rpartition(".")
    return prefix + dot, module, leaf
