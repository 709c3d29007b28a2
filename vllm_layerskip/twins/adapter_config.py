# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter's two JSON files: peft's settings, and what ``vllm-layerskip train`` recorded.

peft has many kinds of LoRA. A merge of ``scaling * B @ A`` is right for some of them, and for the
others it would give weights that nobody trained. So settings are allowed by name; one that this
module does not know is refused as soon as it is switched on.

Errors here name neither the option nor the folder: ``adapter.read_draft_adapter`` puts them before.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG_NAME = "adapter_config.json"
RECORD_NAME = "layerskip_adapter.json"

_HARMLESS = frozenset(
    {
        # What the adapter is for, and how it was trained or saved.
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
        "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
        "megatron_core", "peft_type", "peft_version", "revision", "runtime_config",
        "target_modules", "task_type", "velora_config",
        # Read below, or seen in the names of the weights.
        "alpha_pattern", "init_lora_weights", "lora_alpha", "modules_to_save", "r",
        "rank_pattern", "use_rslora",
        # Settings of a way to begin training; init_lora_weights says which way it was.
        "corda_config", "eva_config", "loftq_config", "lora_ga_config",
        # Settings of a kind of LoRA that another setting switches on.
        "qalora_group_size",
    }
)  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {})
_REFUSED = {
    "use_dora": "DoRA scales each output by its norm",
    "bias": "trained biases are not merged",
    "lora_bias": "trained biases are not merged",
    "fan_in_fan_out": "its weights are stored transposed",
    "layer_replication": "it changes the number of layers",
    "trainable_token_indices": "it changes embeddings, which drafts share with the target",
    "target_parameters": "it adapts parameters that are no linear layer's weight",
    "alora_invocation_tokens": "it applies to some tokens only",
}
_SAME_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin training (``init_lora_weights``) that leave the base model's weights alone."""

_LARGEST = 1e6
"""Above any scaling that was meant."""


@dataclass(frozen=True)
class LoraConfig:
    """What a merge needs of ``adapter_config.json``."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of some modules, by a regular expression for the end of the name."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_key_of(module, self.rank_pattern), self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor of ``B @ A``, as in peft."""
        alpha = self.alpha_pattern.get(_key_of(module, self.alpha_pattern), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Record:
    """``layerskip_adapter.json``; an adapter of another tool has none."""

    base_model: str | None = None
    base_digest: str | None = None
    """``digest.checkpoint_digest`` of the base model's folder."""
    exit_layer: int | None = None
    """E that the adapter was trained for."""


def _key_of(module: str, pattern: dict[str, Any]) -> str:
    """The first key that matches the end of a module's name, as in peft's ``get_pattern_key``."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), module)


def read_config(folder: Path) -> LoraConfig:
    """``adapter_config.json``.

    Raises:
        ValueError: it cannot be read, or the adapter is of a kind that cannot be merged.
    """
    values = _read_json(
        folder / CONFIG_NAME,
        "Give a folder that peft's save_pretrained or vllm-layerskip train wrote.",
    )
    if (kind := values.get("peft_type")) != "LORA":
        raise ValueError(
            f"{CONFIG_NAME} has peft_type={kind!r}, and a draft adapter must be 'LORA'. Train one "
            "with vllm-layerskip train (recipe.target: frozen) or peft's LoraConfig."
        )
    _refuse_unknown_kinds(values)
    return LoraConfig(
        rank=_positive_integer("r", values.get("r")),
        alpha=_positive("lora_alpha", values.get("lora_alpha")),
        rank_pattern={
            key: _positive_integer(f"rank_pattern[{key!r}]", value)
            for key, value in _pattern("rank_pattern", values).items()
        },
        alpha_pattern={
            key: _positive(f"alpha_pattern[{key!r}]", value)
            for key, value in _pattern("alpha_pattern", values).items()
        },
        use_rslora=bool(values.get("use_rslora")),
        base_model=_text(values.get("base_model_name_or_path")),
    )


def read_record(folder: Path) -> Record:
    """``layerskip_adapter.json``, empty if there is none.

    Raises:
        ValueError: it cannot be read, or a value has the wrong type.
    """
    if not (folder / RECORD_NAME).exists():
        return Record()
    remedy = "Copy the adapter again, or delete the file: it is optional."
    values = _read_json(folder / RECORD_NAME, remedy)
    exit_layer = values.get("exit_layer")
    if exit_layer is not None:
        exit_layer = _positive_integer("exit_layer", exit_layer, RECORD_NAME)
    digest = values.get("base_digest")
    if digest is not None and not isinstance(digest, str):
        raise ValueError(f"{RECORD_NAME} has base_digest={digest!r}, which must be text. {remedy}")
    return Record(_text(values.get("base_model")), digest, exit_layer)


def _refuse_unknown_kinds(values: dict[str, Any]) -> None:
    init = values.get("init_lora_weights", True)
    if init not in _SAME_BASE:
        raise ValueError(
            f"{CONFIG_NAME} has init_lora_weights={init!r}: such training changes the base model's "
            "weights, too, so the adapter does not fit the model as published. Convert it by "
            "peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), or train "
            "with init_lora_weights=True."
        )
    for name, value in values.items():
        if name in _HARMLESS or value in _OFF:
            continue
        why = _REFUSED.get(name, "merging such an adapter is not known to be right")
        raise ValueError(
            f"{CONFIG_NAME} has {name}={value!r}: {why}. Train a plain LoRA adapter, without "
            f"{name}."
        )


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {file.name} in it. {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read ({error}). {remedy}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} holds no JSON object. {remedy}")
    return values


def _pattern(name: str, values: dict[str, Any]) -> dict[str, Any]:
    pattern = values.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{CONFIG_NAME} has {name}={pattern!r}, which must be a JSON object.")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(
                f"{CONFIG_NAME} has {name} with the key {key!r}, which is no regular expression "
                f"({error})."
            ) from None
    return pattern


def _positive_integer(name: str, value: Any, file: str = CONFIG_NAME) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{file} has {name}={value!r}, which must be an integer of at least 1.")
    return value


def _positive(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < _LARGEST:
        raise ValueError(
            f"{CONFIG_NAME} has {name}={value!r}, which must be a number above 0 and below "
            f"{_LARGEST:g}."
        )
    return float(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
