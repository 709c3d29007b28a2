# SPDX-License-Identifier: Apache-2.0
"""The settings of ``vllm-layerskip eval``. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_layerskip.errors import UserError

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
    labels: tuple[str, ...] | None = None
    """Names of the checkpoints in table and plot; None: their folders' names."""
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
        labels_of(self._names, self.labels)

    @property
    def _names(self) -> list[str]:
        return [self.model] if self.compare is None else [self.model, self.compare]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        labels = labels_of(self._names, self.labels)
        return list(map(Checkpoint, ("--model", "--compare"), self._names, labels))


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
