# SPDX-License-Identifier: Apache-2.0
"""The YAML file of ``vllm-layerskip train``: sections for model, data, recipe, training, LoRA and
output. docs/training.md explains every key.

Nothing here imports torch, so mistakes are reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from vllm_layerskip.errors import UserError, one_line
from vllm_layerskip.training.drafts.recipe import DraftRecipe
from vllm_layerskip.training.recipe import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]
AnyRecipe = Recipe | DraftRecipe
_TARGETS: dict[str, type[Recipe] | type[DraftRecipe]] = {"whole": Recipe, "frozen": DraftRecipe}
"""Classes of the section ``recipe`` by its key ``target``: what is trained."""
Section = TypeVar("Section")


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint to go on with, or the shape of a model to start from scratch."""

    path: str | None = None
    """Checkpoint: a folder or a name on the model hub."""
    model_type: str | None = None
    """From scratch: transformers' name of the architecture, such as "llama"."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """From scratch: arguments of that architecture's config, such as hidden_size."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer; default: the checkpoint's."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the model hub."""
    dtype: Dtype = "float32"
    """Dtype of the weights in training; with `training.bf16` the model computes in bfloat16."""
    attn_implementation: str | None = None
    """Attention of transformers, such as "sdpa", "flash_attention_2" or "eager"."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.model_type is None):
            raise UserError(
                "model: give exactly one of path (go on with a checkpoint) and model_type with "
                "config (from scratch)."
            )
        if self.model_type is not None and self.tokenizer is None:
            raise UserError(
                "model.tokenizer: a model from scratch needs one. Name the folder of a tokenizer."
            )
        if self.path is not None and self.config:
            raise UserError(
                "model.config is for models from scratch; with model.path the shape is the "
                "checkpoint's. Leave one of them out."
            )


@dataclass(frozen=True)
class Source:
    """Where texts come from: exactly one of files, dataset and python_stdlib."""

    files: tuple[str, ...] = ()
    """Files, folders or patterns: text files (one document each), and .jsonl, .ndjson, .json or
    .parquet files (one document a record)."""
    dataset: str | None = None
    """A Hugging Face dataset: its name, a file, a folder that `load_dataset` reads, or one that
    `save_to_disk` wrote."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str | None = None
    """Split of the dataset; default: train."""
    python_stdlib: Literal["train", "held_out"] | None = None
    """The running Python's standard library without its held-out modules, or these alone."""
    max_samples: int | None = None
    """Stop after so many samples, in the order of the texts."""

    def with_absolute_paths(self) -> Source:
        files = tuple(str(Path(file).absolute()) for file in self.files)
        return dataclasses.replace(self, files=files, dataset=_absolute(self.dataset))

    def check(self, key: str) -> None:
        given = [name for name in ("files", "dataset", "python_stdlib") if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                f"{key}: give exactly one of files, dataset and python_stdlib, not "
                f"{' and '.join(given) or 'none'}."
            )
        if (self.name or self.split) and not self.dataset:
            raise UserError(f"{key}: name and split belong to dataset. Leave them out.")
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"{key}.max_samples={self.max_samples} must be at least 1.")


@dataclass(frozen=True)
class DataConfig:
    """Texts to train and evaluate on, and how samples are made of them."""

    train: Source
    eval: Source | None = None
    seq_len: int = 2048
    """Tokens of a training sample."""
    packing: bool = True
    """Fill each sample with as many documents as fit; else one document is one sample."""
    loss_on: Literal["responses", "all"] = "responses"
    """Tokens of chats and prompt-response pairs to train on. Plain text always is trained on."""
    text_field: str = "text"
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    response_field: str = "response"

    def __post_init__(self) -> None:
        self.train.check("data.train")
        if self.eval is not None:
            self.eval.check("data.eval")
        if self.seq_len < 2:
            raise UserError(f"data.seq_len={self.seq_len} must be at least 2.")


@dataclass(frozen=True)
class OutputConfig:
    """Where the checkpoint goes, and what its config.json says for serving."""

    folder: Path
    """Folder of the finished checkpoint."""
    run_folder: Path | None = None
    """Folder of checkpoints to resume from and of TensorBoard's files; default: FOLDER.run."""
    exit_layer: int | None = None
    """E for serving; goes into the checkpoint's config.json."""
    num_speculative_tokens: int | None = None
    """K for serving; goes into the checkpoint's config.json."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the stored weights; "auto": the base checkpoint's, bfloat16 from scratch."""

    def __post_init__(self) -> None:
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 1:
            raise UserError(
                f"output.num_speculative_tokens={self.num_speculative_tokens} must be at least 1."
            )

    @property
    def resolved_run_folder(self) -> Path:
        return self.run_folder or self.folder.with_name(f"{self.folder.name}.run")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Raises:
        UserError: it names the key and the remedy.
    """

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    recipe: AnyRecipe = field(default_factory=Recipe)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of transformers.TrainingArguments."""
    lora: Mapping[str, Any] | None = None
    """Arguments of peft.LoraConfig; None: all weights are trained, or a draft adapter has the
    defaults."""

    def __post_init__(self) -> None:
        for name, remedy in _NOT_FOR_TRAINING.items():
            if name in self.training:
                raise UserError(f"training.{name} is not a key here. {remedy}")
        if isinstance(self.recipe, DraftRecipe):
            self._check_for_drafts()

    def _check_for_drafts(self) -> None:
        """Refuse keys of other sections that mean nothing where a draft adapter is trained."""
        if self.model.path is None:
            raise UserError(
                "model.path is missing: recipe.target='frozen' trains an adapter for a checkpoint. "
                "Name it, or set recipe.target to 'whole' for a model from scratch."
            )
        if self.model.attn_implementation not in (None, "sdpa", "eager"):
            raise UserError(
                f"model.attn_implementation={self.model.attn_implementation!r} must be one of "
                "'sdpa', 'eager' where recipe.target is 'frozen': drafts attend by a mask that "
                "others do not take. Leave it out."
            )
        for name, reason in _NOT_FOR_DRAFTS.items():
            if self.training.get(name):
                raise UserError(
                    f"training.{name}={self.training[name]!r} does not go with recipe.target="
                    f"'frozen': {reason} Leave it out."
                )
        for name in ("exit_layer", "num_speculative_tokens"):
            if getattr(self.output, name) is not None:
                raise UserError(
                    f"output.{name} goes into a checkpoint's config.json, and recipe.target="
                    f"'frozen' makes an adapter. Use recipe.{name}."
                )
        for name in self.lora or ():
            if name not in _DRAFT_LORA:
                raise UserError(
                    f"lora.{name} must be one of {', '.join(_DRAFT_LORA)} where recipe.target is "
                    "'frozen': serving merges plain LoRA into layers 0..E-1. Leave it out."
                )

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """A config from a file.

        Raises:
            UserError: the file cannot be read, is no YAML, or has a mistake.
        """
        import yaml  # type: ignore[import-untyped]

        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--config {path}: {error.strerror}. Give a YAML file.") from None
        except UnicodeDecodeError:
            raise UserError(f"--config {path}: this is no UTF-8 text. Give a YAML file.") from None
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--config {path}: this is no YAML ({one_line(error)}).") from None
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Any) -> TrainConfig:
        """A config from the mapping that a YAML file or ``to_dict`` gives.

        Raises:
            UserError: it names the key and the remedy.
        """
        return _build(cls, values, "")

    def with_absolute_paths(self) -> TrainConfig:
        """Paths made absolute, for any working directory; names on the model hub stay names."""
        model, data, output = self.model, self.data, self.output
        return dataclasses.replace(
            self,
            model=dataclasses.replace(
                model, path=_absolute(model.path), tokenizer=_absolute(model.tokenizer)
            ),
            data=dataclasses.replace(
                data,
                train=data.train.with_absolute_paths(),
                eval=data.eval and data.eval.with_absolute_paths(),
            ),
            recipe=self.recipe.with_absolute_paths(),
            output=dataclasses.replace(
                output,
                folder=output.folder.absolute(),
                run_folder=output.resolved_run_folder.absolute(),
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return _plain(self)


_DRAFT_LORA = ("lora_alpha", "lora_dropout", "r", "target_modules", "use_rslora")
"""Keys of the section ``lora`` for a draft adapter: what a merge of ``scaling * B @ A`` covers."""

_NOT_FOR_DRAFTS = {
    "fsdp": "nobody has seen sharded drafts learn.",
    "deepspeed": "nobody has seen sharded drafts learn.",
    "fp16": "small gradients of soft labels vanish in float16; use bf16.",
}

_NOT_FOR_TRAINING = {
    "output_dir": "Use output.run_folder and output.folder.",
    "resume_from_checkpoint": "Use --resume.",
    "remove_unused_columns": "Leave it out.",
    "push_to_hub": "Upload output.folder when the run is done.",
}


def _build(cls: type[Section], values: Any, key: str) -> Section:
    """A section from the YAML's mapping.

    Args:
        key: of the section, "" for the whole file.
    """
    where = key or "the file"
    if not isinstance(values, Mapping):
        names = ", ".join(item.name for item in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise UserError(f"{where} must be a mapping with keys of {names}, not {values!r}.")
    items = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(values, items, key)
    for name, item in items.items():
        if name not in values and _is_required(item):
            raise UserError(f"{_join(key, name)} is missing. Every run needs it.")
    hints = typing.get_type_hints(cls)
    coerced = {
        name: _coerce(value, hints[name], _join(key, name)) for name, value in values.items()
    }
    try:
        return cls(**coerced)
    except ValueError as error:  # Recipe's own checks know nothing of the section.
        raise UserError(f"{key}.{error}") from None


def _build_recipe(values: Any, key: str) -> AnyRecipe:
    """The section ``recipe``, of the class that its ``target`` says."""
    if not isinstance(values, Mapping):
        return _build(Recipe, values, key)
    target = values.get("target", "whole")
    if not isinstance(target, str) or target not in _TARGETS:
        raise UserError(
            f"{key}.target={target!r} must be one of {', '.join(map(repr, _TARGETS))}: all of the "
            "model is trained, or an adapter for the drafts of a frozen one."
        )
    fields = {
        name: {item.name for item in dataclasses.fields(cls)} for name, cls in _TARGETS.items()
    }
    for name in values:
        for other in fields:
            if other != target and name in fields[other] - fields[target] - {"target"}:
                raise UserError(
                    f"{key}.{name} belongs to {key}.target={other!r}, and the target is "
                    f"{target!r}. Leave {name} out, or set the target."
                )
    own = {name: value for name, value in values.items() if name != "target"}
    return _build(_TARGETS[target], own, key)  # type: ignore[type-var]


def _is_required(item: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return item.default is missing and item.default_factory is missing


def check_keys(values: Iterable[Any], valid: Iterable[str], key: str) -> None:
    """Refuse unknown keys of a section.

    Raises:
        UserError: it names the key and what may have been meant.
    """
    valid = sorted(valid)
    for name in values:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            known = f" Valid keys: {', '.join(valid)}." if len(valid) < 20 else ""
            raise UserError(f"{_join(key, name)} is no key of this file.{meant}{known}")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """Convert a value to the type of its field; YAML 1.1 reads 3e-4 as text."""
    if hint == AnyRecipe:
        return value if isinstance(value, AnyRecipe) else _build_recipe(value, key)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _coerce(value, next(o for o in options if o is not type(None)), key)
    if origin is Literal:
        if value not in options:
            raise UserError(f"{key}={value!r} must be one of {', '.join(map(repr, options))}.")
        return value
    if origin is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(v, options[0], f"{key}[{i}]") for i, v in enumerate(values))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, key)  # type: ignore[arg-type]
    if origin is not None:  # Mapping
        if not isinstance(value, Mapping):
            raise UserError(f"{key} must be a mapping of keys to values, not {value!r}.")
        return dict(value)
    return _scalar(value, hint, key)


def _scalar(value: Any, hint: type, key: str) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    names = {
        Path: "a path",
        float: "a number",
        int: "an integer",
        bool: "true or false",
        str: "text",
    }
    raise UserError(f"{key}={value!r} must be {names[hint]}.")


def _absolute(name: str | None) -> str | None:
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
