# SPDX-License-Identifier: Apache-2.0
"""The settings of a batch: those of the command line, and those that the answers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_layerskip.batch.parameters import merged
from vllm_layerskip.batch.rows import OWN_COLUMNS, TEXT_FIELD
from vllm_layerskip.errors import UserError


@dataclass(frozen=True)
class EngineSettings:
    """Which engine answers. None leaves a value to the checkpoint or to vLLM."""

    model: str
    exit_layer: int | str | None = None
    num_speculative_tokens: int | None = None
    draft_quantization: str | None = None
    draft_adapter: str | None = None
    speculation: bool = True
    """False for plain vLLM."""
    tensor_parallel_size: int = 1
    device: str = "cuda"
    dtype: str | None = None
    max_model_len: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's ``LLM``; they override those above."""

    def speculative_config(self) -> dict[str, Any] | None:
        """vLLM's ``speculative_config``.

        Raises:
            UserError: there is to be no speculation, but one of its options is given.
        """
        options = {
            "exit_layer": self.exit_layer,
            "num_speculative_tokens": self.num_speculative_tokens,
            "draft_quantization": self.draft_quantization,
            "draft_adapter": self.draft_adapter,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if self.speculation:
            return {"method": "layerskip", **given}
        if given:
            flags = ", ".join(
                f"--{name.replace('_', '-')} {value}" for name, value in given.items()
            )
            raise UserError(f"--no-speculation excludes {flags}. Leave one of them out.")
        return None

    def llm_arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's ``LLM``, but for ``model`` and ``speculative_config``.

        Raises:
            UserError: one of these two is in ``engine_args``.
        """
        own = {
            "model": "--model",
            "speculative_config": "--exit-layer and --num-speculative-tokens",
        }
        for name, flag in own.items():
            if name in self.engine_args:
                raise UserError(f"--engine-args: {name} cannot be given there. Use {flag}.")
        arguments: dict[str, Any] = {
            "dtype": self.dtype or ("float32" if self.device == "cpu" else "auto")
        }
        if self.max_model_len is not None:
            arguments["max_model_len"] = self.max_model_len
        if self.tensor_parallel_size != 1:
            arguments["tensor_parallel_size"] = self.tensor_parallel_size
        return {**arguments, **self.engine_args}


@dataclass(frozen=True)
class RayCluster:
    """Where Ray Data runs the engines."""

    num_replicas: int
    address: str | None = None
    """The address of a Ray cluster; None starts or finds one on this machine."""
    device: str = "cuda"
    rows_per_task: int = 16
    """Rows that a replica takes at once, and that run again if it dies."""


@dataclass(frozen=True)
class OutputSettings:
    """What is written, and where."""

    folder: Path
    format: str = "jsonl"
    """Or ``parquet``."""
    with_token_ids: bool = False
    overwrite: bool = False
    """Whether to remove the files of an earlier run first."""

    @property
    def file(self) -> Path:
        """The file of answers."""
        return self.folder / f"output.{self.format}"


@dataclass(frozen=True)
class BatchSettings:
    """A file of prompts to answer."""

    inputs: Sequence[str]
    """Files, folders or patterns."""
    output: OutputSettings
    engine: EngineSettings
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    """For rows that do not set their own."""
    cluster: RayCluster | None = None
    """None runs one engine in this process."""
    text_field: str = TEXT_FIELD
    """The column of prompts that are texts."""


@dataclass(frozen=True)
class JobSettings:
    """Everything that the answers depend on, as ``settings.json`` has it."""

    model: str
    speculative_config: Mapping[str, Any] | None
    engine_args: Mapping[str, Any]
    """Arguments of vLLM's ``LLM``, but for the two above."""
    sampling_params: Mapping[str, Any]
    input: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Name and digest of each input file."""
    text_field: str = TEXT_FIELD


def job_settings(
    engine: EngineSettings,
    sampling_params: Mapping[str, Any],
    files: Iterable[Path],
    text_field: str = TEXT_FIELD,
) -> JobSettings:
    """Check the settings and complete them by the defaults.

    Raises:
        UserError: one is wrong; the message names it, its value and what to do.
    """
    try:
        sampling_params = merged(sampling_params, None, source="command line")
    except ValueError as error:
        raise UserError(str(error)) from None
    if text_field in OWN_COLUMNS:
        raise UserError(
            f"--text-field {text_field}: {', '.join(OWN_COLUMNS)} have a meaning of their own. "
            "Name the column of the prompts."
        )
    return JobSettings(
        model=engine.model,
        speculative_config=engine.speculative_config(),
        engine_args=engine.llm_arguments(),
        sampling_params=sampling_params,
        input=[(str(file), _file_digest(file)) for file in files],
        text_field=text_field,
    )


def _file_digest(path: Path) -> str:
    """The first digits of a SHA-256 over a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"--input {path}: {error.strerror}. Give a readable file.") from None
