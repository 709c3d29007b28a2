# SPDX-License-Identifier: Apache-2.0
"""The settings of ``vllm-layerskip eval``. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_layerskip.errors import UserError
from vllm_layerskip.twins.kinds import NONE

BeginOfSequence = Literal["document", "window", "none"]
Dtype = Literal["float32", "bfloat16"]
DEFAULT_SEQ_LEN = 2048
"""Or the model's longest, if that is shorter."""


@dataclass(frozen=True)
class TextSettings:
    """Which text is scored, and how it is cut into windows.

    Raises:
        UserError: it names the option.
    """

    sources: tuple[str, ...]
    """``--data``: files, folders, or "stdlib"."""
    text_field: str = "text"
    """Field of a .jsonl file's objects that holds the text."""
    bos: BeginOfSequence = "document"
    """Where the beginning-of-sequence token stands."""
    max_tokens: int | None = None
    """Tokens of the stream to use; None: all."""
    seq_len: int | None = None
    """Tokens of a window; None: ``DEFAULT_SEQ_LEN``, or the model's maximum if less."""
    stride: int | None = None
    """Tokens between windows' starts; None: those of a window, so that none overlap."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("--data is missing: text to score, or 'stdlib'.")
        _check_least("--seq-len", self.seq_len, 2)
        _check_least("--max-tokens", self.max_tokens, 2)


@dataclass(frozen=True)
class TwinSettings:
    """Which draft twin is scored beside its model."""

    draft_quantization: str = NONE
    """One of ``twins.kinds.CHOICES``."""
    draft_adapter: str | None = None
    """Folder of a draft adapter."""

    @property
    def option(self) -> str:
        """The options that ask for it, for messages."""
        quantization = f"--draft-quantization {self.draft_quantization}"
        adapter = f"--draft-adapter {self.draft_adapter}"
        if self.draft_adapter is None:
            return quantization
        return adapter if self.draft_quantization == NONE else f"{quantization} {adapter}"

    @property
    def name(self) -> str:
        """For labels."""
        adapter = None if self.draft_adapter is None else f"adapter {Path(self.draft_adapter).name}"
        kind = None if self.draft_quantization == NONE else self.draft_quantization
        return " + ".join(filter(None, (kind, adapter)))


class Checkpoint(NamedTuple):
    option: str
    """The option that names it, for messages."""
    name: str
    """Folder or name on the model hub."""
    label: str
    """Its name in table and plot."""


@dataclass(frozen=True)
class EvalSettings:
    """One evaluation.

    Raises:
        UserError: it names the option.
    """

    model: str
    text: TextSettings
    compare: str | None = None
    """A second checkpoint with the same tokenizer."""
    twin: TwinSettings | None = None
    """The model's draft twin, which is scored beside it; None: none."""
    labels: tuple[str, ...] | None = None
    """Names in table and plot; None: the folders' names, and what the twin is."""
    dtype: Dtype = "float32"
    device: str = "auto"
    """A device of torch, or "auto": a GPU if there is one."""
    batch_size: int = 4
    """Windows in a forward pass."""
    trust_remote_code: bool = False
    argv: tuple[str, ...] = ()
    """The command line, which the result repeats."""

    def __post_init__(self) -> None:
        _check_least("--batch-size", self.batch_size, 1)
        if self.twin is not None and self.compare is not None:
            raise UserError(
                f"--compare and {self.twin.option} exclude each other: the second model is the "
                "twin. Score the two checkpoints one after the other."
            )
        labels_of(self._names, self.labels)

    @property
    def _names(self) -> list[str]:
        if self.twin is not None:
            return [self.model, f"{self.model} {self.twin.name}"]
        return [self.model] if self.compare is None else [self.model, self.compare]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        names = [self.model] if self.compare is None else [self.model, self.compare]
        labels = labels_of(self._names, self.labels)
        return list(map(Checkpoint, ("--model", "--compare"), names, labels))

    @property
    def twin_label(self) -> str:
        """The twin's name in table and plot."""
        return labels_of(self._names, self.labels)[-1]


def labels_of(names: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """A label for each model: as given, or its folder's name if these differ, or its whole name.

    Raises:
        UserError: the number of labels is wrong, or two are the same.
    """
    if given is None:
        labels = [Path(name).name or name for name in names]
        return labels if len(set(labels)) == len(labels) else list(names)
    if len(given) != len(names):
        raise UserError(
            f"--labels {' '.join(given)}: there must be {len(names)}, one for each model."
        )
    if len(set(given)) != len(given):
        raise UserError(f"--labels {' '.join(given)}: they must differ.")
    return list(given)


def _check_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{option} {value} must be at least {least}.")
