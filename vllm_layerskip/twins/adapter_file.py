# SPDX-License-Identifier: Apache-2.0
"""The names and shapes in an adapter's file of weights, and a digest of the adapter.

Shapes: N outputs, M inputs, R the rank; A is ``[R, M]`` and B ``[N, R]``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vllm_layerskip.twins.adapter_config import CONFIG_NAME
from vllm_layerskip.twins.adapter_target import FINAL_NORM, TRANSLATOR, Shape, layer_of

WEIGHTS_NAME = "adapter_model.safetensors"

_DTYPES = ("F32", "F16", "BF16")
_DIGEST_BYTES = 1 << 20
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)"
    r"(?:\.(?P<part>lora_A|lora_B|modules_to_save)(?:\.default)?)?\.weight"
)


class Lora(NamedTuple):
    """The names in the file of one module's low-rank weights."""

    a: str
    b: str


@dataclass(frozen=True)
class AdapterFile:
    """What a file of weights holds."""

    shapes: Mapping[str, Shape]
    """By the name in the file."""
    modules: Mapping[str, Lora]
    """By the module's full name in transformers."""
    final_norm: str | None
    """The name in the file of the final norm's weight; None: there is none."""
    translator: str | None
    """The name in the file of the exit translator's weight; None: there is none."""


def read_adapter_file(file: Path) -> AdapterFile:
    """Read the header of an adapter's weights.

    Raises:
        ValueError: it cannot be read, or holds what a merge cannot use.
    """
    shapes = _read_shapes(file)
    pairs, exits = _sort_names(shapes)
    for module, found in pairs.items():
        if len(found) < 2:
            raise ValueError(
                f"{file.name} holds only {next(iter(found))} of {module}. Copy the adapter again."
            )
    if not pairs:
        raise ValueError(
            f"{file.name} adapts no linear layer. Train an adapter whose target_modules are in "
            "model.layers."
        )
    modules = {name: Lora(found["lora_A"], found["lora_B"]) for name, found in pairs.items()}
    return AdapterFile(shapes, modules, exits.get(FINAL_NORM), exits.get(TRANSLATOR))


def _read_shapes(file: Path) -> dict[str, Shape]:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise ValueError(
            f"there is no {file.name} in it. Save the adapter as safetensors (peft's "
            "save_pretrained does): other formats can run code when they are read."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}. Copy the adapter again.") from None
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ValueError(
                f"{file.name} holds {name} as {dtype}, which must be one of {', '.join(_DTYPES)}. "
                "Save the adapter without quantisation."
            )
    return shapes


def _sort_names(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The names of A and B by module, and those of the final norm and the translator."""
    pairs: dict[str, dict[str, str]] = {}
    exits: dict[str, str] = {}
    for name in sorted(names):
        match = _KEY.fullmatch(name)
        module, part = (match["module"], match["part"]) if match else (name, "unknown")
        if part in ("lora_A", "lora_B") and layer_of(module) is not None:
            pairs.setdefault(module, {})[part] = name
        elif part in (None, "modules_to_save") and module in (FINAL_NORM, TRANSLATOR):
            exits[module] = name
        else:
            raise ValueError(
                f"{WEIGHTS_NAME} holds {name}, and a draft adapter holds plain LoRA weights of "
                f"linear layers in model.layers, and at most the weights of {FINAL_NORM} and of "
                f"{TRANSLATOR}. Train it "
                "with target_modules in model.layers, and with modules_to_save=None or "
                f"[{FINAL_NORM!r}] (peft takes 'norm' for every norm)."
            )
    return pairs, exits


def adapter_digest(folder: Path) -> str:
    """16 hex digits of what a merge depends on: peft's settings and the weights."""
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    with (folder / WEIGHTS_NAME).open("rb") as file:
        while chunk := file.read(_DIGEST_BYTES):
            digest.update(chunk)
    return digest.hexdigest()[:16]
