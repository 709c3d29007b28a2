# SPDX-License-Identifier: Apache-2.0
"""A draft adapter on disk: checked before weights load, and its weights for a merge.

A draft adapter is a LoRA folder of peft for layers 0..E-1 and, if wanted, the final norm. It is
merged into the draft twin only; the target stays what it is. Behind that norm it may have a linear
map, the exit translator (training/drafts/translator.py).

Shapes: N outputs, M inputs of a linear layer, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.twins.adapter_config import (
    CONFIG_NAME,
    RECORD_NAME,
    LoraConfig,
    Record,
    read_config,
    read_record,
)
from vllm_layerskip.twins.adapter_file import (
    WEIGHTS_NAME,
    AdapterFile,
    adapter_digest,
    read_adapter_file,
)
from vllm_layerskip.twins.adapter_target import Target, layer_of, target_of
from vllm_layerskip.twins.digest import checkpoint_digest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DraftAdapter:
    """An adapter that fits its target."""

    path: Path
    source: str
    """How the user named it, for messages."""
    digest: str
    """Of peft's settings and the weights, 16 hex digits."""
    scaling: Mapping[str, float]
    """The factor of ``B @ A``, by the module's full name in transformers."""
    has_final_norm: bool
    has_translator: bool
    num_layers: int
    """The fewest layers that hold every adapted module."""
    base_model: str | None
    """The name of the model that it was trained on, if one is written down."""
    exit_layer: int | None
    """E that it was trained for, if that is written down."""


def read_draft_adapter(
    path: Path,
    source: str,
    *,
    hf_config: Any,
    base_name: str,
    num_layers: int,
    base_folder: Path | None = None,
    exit_layer: int | None = None,
) -> DraftAdapter:
    """Check an adapter's folder against its target; of the weights it reads names and shapes.

    Args:
        source: how the user named it, such as ``--draft-adapter PATH``.
        hf_config: the target's, of transformers.
        base_name: the target's name, for messages.
        num_layers: L, the target's layers.
        base_folder: the target's folder, if there is one to tell its weights from others.
        exit_layer: E, the layers that draft; None: any.

    Raises:
        ValueError: the folder is no adapter, or it does not fit the target; the message begins
            with ``source`` and says what to do.
    """
    with _naming(source):
        if not _is_folder(path):
            raise ValueError(
                f"there is no folder {str(path)!r}. Give one with {CONFIG_NAME} and "
                f"{WEIGHTS_NAME}, as vllm-layerskip train and peft's save_pretrained write them; "
                "download an adapter of the model hub first."
            )
        config, record = read_config(path), read_record(path)
        file = read_adapter_file(path / WEIGHTS_NAME)
        adapter = DraftAdapter(
            path=path,
            source=source,
            digest=adapter_digest(path),
            scaling={module: config.scaling_of(module) for module in file.modules},
            has_final_norm=file.final_norm is not None,
            has_translator=file.translator is not None,
            num_layers=1 + max(layer_of(module) or 0 for module in file.modules),
            base_model=record.base_model or config.base_model,
            exit_layer=record.exit_layer,
        )
        _check_shapes(adapter, file, target_of(hf_config, base_name, num_layers))
        _check_ranks(file, config)
        _check_base(record, base_name, base_folder)
        if exit_layer is not None:
            _check_exit_layer(adapter, exit_layer, num_layers)
        return adapter


class AdapterWeights:
    """The weights of an adapter, each read when it is asked for.

    Raises:
        ValueError: the files are not those that were checked.
    """

    def __init__(self, adapter: DraftAdapter) -> None:
        from safetensors import safe_open

        self._adapter = adapter
        with _naming(adapter.source):
            _check_unchanged(adapter)
            self._names = read_adapter_file(adapter.path / WEIGHTS_NAME)
        self._file = safe_open(adapter.path / WEIGHTS_NAME, framework="pt")

    @property
    def module_names(self) -> tuple[str, ...]:
        """Full names in transformers of the linear layers that the adapter changes."""
        return tuple(self._adapter.scaling)

    def check_finite(self) -> None:
        """Read every weight once, to find a training that diverged before anything is merged.

        Raises:
            ValueError: a weight is not finite.
        """
        for name in self._names.shapes:
            self._read(name)

    def delta(self, module_name: str) -> torch.Tensor | None:
        """What a merge adds to a linear layer's weight, ``[N, M]`` float32; None: nothing.

        Raises:
            ValueError: a weight is not finite.
        """
        names = self._names.modules.get(module_name)
        if names is None:
            return None
        return (self._read(names.b) @ self._read(names.a)) * self._adapter.scaling[module_name]

    def final_norm(self) -> torch.Tensor | None:
        """The final norm's weight as transformers has it, ``[H]`` float32; None: the target's own.

        Raises:
            ValueError: a weight is not finite.
        """
        name = self._names.final_norm
        return None if name is None else self._read(name)

    def translator(self) -> torch.Tensor | None:
        """A linear map behind the final norm, ``[H, H]`` float32: ``W`` of ``W x``; None: none.

        Raises:
            ValueError: a weight is not finite.
        """
        name = self._names.translator
        return None if name is None else self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self._file.get_tensor(name).float()
        if not weight.isfinite().all():
            raise ValueError(
                f"{self._adapter.source}: {name} in {WEIGHTS_NAME} has values that are not finite, "
                "as after a training that diverged. Give another adapter."
            )
        return weight


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Put before an error's message how the user named the adapter."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # Its name is too long, or a folder above it is not ours to read.
        return False


def _check_shapes(adapter: DraftAdapter, file: AdapterFile, target: Target) -> None:
    for module, names in file.modules.items():
        a, b = file.shapes[names.a], file.shapes[names.b]
        target.check_linear(module, a, b, adapter.base_model)
    if file.final_norm is not None:
        target.check_final_norm(file.shapes[file.final_norm], adapter.base_model)
    if file.translator is not None:
        target.check_translator(file.shapes[file.translator], adapter.base_model)


def _check_ranks(file: AdapterFile, config: LoraConfig) -> None:
    for module, names in file.modules.items():
        rank, found = config.rank_of(module), (file.shapes[names.a][0], file.shapes[names.b][1])
        if found != (rank, rank):
            raise ValueError(
                f"{module!r} has A of rank {found[0]} and B of rank {found[1]}, and {CONFIG_NAME} "
                f"says {rank} (r, rank_pattern). The files are not of one adapter: copy both again."
            )


def _check_base(record: Record, base_name: str, base_folder: Path | None) -> None:
    """Tell a model from another of the same shapes, such as its fine-tuned sibling."""
    if record.base_digest is None or base_folder is None:
        return
    digest = checkpoint_digest(base_folder)
    if digest is not None and digest != record.base_digest:
        raise ValueError(
            f"it was made for {record.base_model!r} with the weights {record.base_digest}, and the "
            f"target {base_name!r} has {digest}: other values, or the same in another dtype. Give "
            "an adapter that was trained on the target; to try this one all the same, delete "
            f"base_digest from {RECORD_NAME}."
        )


def _check_exit_layer(adapter: DraftAdapter, exit_layer: int, num_layers: int) -> None:
    _check_record_of_layers(adapter, num_layers)
    trained = max(adapter.exit_layer or 0, adapter.num_layers)
    if adapter.num_layers > exit_layer:
        beyond = next(name for name in adapter.scaling if (layer_of(name) or 0) >= exit_layer)
        fault = f"it adapts {beyond!r}, and drafts run the layers 0 to {exit_layer - 1}"
    elif adapter.exit_layer not in (None, exit_layer):
        fault = f"it was trained to exit after {trained} layers ({RECORD_NAME})"
    else:
        return
    bits = " together with draft_quantization" if trained == num_layers else ""
    raise ValueError(
        f"{fault}, as exit_layer={exit_layer}. Set exit_layer to {trained}{bits}, or train an "
        f"adapter for {exit_layer} layers."
    )


def _check_record_of_layers(adapter: DraftAdapter, num_layers: int) -> None:
    """Check that the record's exit layer can be that of these weights and this target."""
    recorded = adapter.exit_layer
    if recorded is None or adapter.num_layers <= recorded <= num_layers:
        return
    found = (
        f"the target has {num_layers} layers"
        if recorded > num_layers
        else f"its weights adapt {adapter.num_layers} layers"
    )
    raise ValueError(
        f"{RECORD_NAME} has exit_layer={recorded}, and {found}. The files are not of one adapter, "
        "or it is another model's: copy it again, or give another one."
    )


def _check_unchanged(adapter: DraftAdapter) -> None:
    try:
        same = adapter_digest(adapter.path) == adapter.digest
    except OSError as error:
        raise ValueError(
            f"{error}. The folder must stay where it is, on every machine of the engine."
        ) from None
    if not same:
        raise ValueError(
            "the adapter's files have changed since they were checked, or are others on this "
            "machine. Start again, with the same files on every machine of the engine."
        )
