# SPDX-License-Identifier: Apache-2.0
"""LayerSkip's drafts as data: a name and what ``speculative_config`` would have.

    --drafts 'int4={"exit_layer": "all", "num_speculative_tokens": 4, "draft_quantization": "int4"}'

The keys are those of ``speculative_config``, and the plugin's own checks resolve them against the
checkpoint before an engine starts. A record has them with every default written out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_layerskip.config.draft_vocab import read_draft_vocab
from vllm_layerskip.config.options import (
    ALL,
    CONFIG_BLOCK,
    VALID_KEYS,
    LayerSkipOptions,
    OptionPath,
    resolve_options,
)
from vllm_layerskip.config.request import METHOD
from vllm_layerskip.errors import UserError
from vllm_layerskip.twins.adapter import read_draft_adapter
from vllm_layerskip.twins.kinds import NONE

OPTION = "--drafts"
EXAMPLE = 'int4={"exit_layer": "all", "num_speculative_tokens": 4, "draft_quantization": "int4"}'

_NAME = re.compile(r"\w[\w .+-]*")
_OTHER_METHODS = ("method", "model")
_SYNTHETIC = ("synthetic_acceptance_length", "synthetic_acceptance_rates")
_KEYS = sorted(VALID_KEYS - {*_OTHER_METHODS, *_SYNTHETIC})


@dataclass(frozen=True)
class Drafts:
    """Drafts that fit the model."""

    name: str
    exit_layer: int
    """E; L where all layers draft."""
    num_speculative_tokens: int
    draft_quantization: str
    has_all_layers: bool
    reuses: bool
    """Whether verification starts from exit states."""
    config: dict[str, Any]
    """``speculative_config`` without the method, every default written out."""
    adapter_digest: str | None = None

    @property
    def pair(self) -> tuple[int, int]:
        return self.exit_layer, self.num_speculative_tokens

    def facts(self) -> dict[str, Any]:
        """What a record says about them."""
        facts: dict[str, Any] = {"name": self.name, "config": self.config}
        if self.adapter_digest is not None:
            facts["adapter_digest"] = self.adapter_digest
        return facts


def speculative_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's ``speculative_config`` of a record's drafts."""
    return {"method": METHOD, **facts["config"]}


def named_config(text: str) -> tuple[str, dict[str, Any]]:
    """The type of ``--drafts``: a name, and keys of ``speculative_config``.

    Raises:
        ArgumentTypeError: it is no NAME=JSON.
    """
    name, equals, content = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be NAME=JSON, with a name of letters, digits, spaces and any of . + - "
            f"_, such as {EXAMPLE}"
        )
    try:
        config = json.loads(content)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {content!r} is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise argparse.ArgumentTypeError(
            f"{name}: {content!r} must be a JSON object of speculative_config's keys, such as "
            f"{EXAMPLE}"
        )
    return name, config


def all_drafts(
    named: Sequence[tuple[str, dict[str, Any]]], model: Path, config: Mapping[str, Any]
) -> list[Drafts]:
    """``--drafts`` against a model with this ``config.json``.

    Raises:
        UserError: two have one name, or LayerSkip would refuse one; the message names it.
    """
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{OPTION} {name} is there twice. Make names differ.")
    return [_drafts(name, request, f"{OPTION} {name}", model, config) for name, request in named]


def drafts_of_checkpoint(model: Path, config: Mapping[str, Any]) -> Drafts:
    """The drafts that the checkpoint's block names.

    Raises:
        UserError: it has no block, or LayerSkip would refuse it.
    """
    block = config.get(CONFIG_BLOCK)
    if not isinstance(block, Mapping) or not {"exit_layer", "num_speculative_tokens"} <= set(block):
        raise UserError(
            f"--pairs: {model} has no layerskip block. Give E:K, or {OPTION} {EXAMPLE}."
        )
    return _drafts(None, {}, "--model", model, config)


def _drafts(
    name: str | None,
    request: Mapping[str, Any],
    source: str,
    model: Path,
    config: Mapping[str, Any],
) -> Drafts:
    """Checked drafts; without a name they get one that says what they are."""
    _refuse_other_methods(request, source)
    num_layers = config["num_hidden_layers"]
    try:
        options = resolve_options(request, num_layers, config.get(CONFIG_BLOCK))
        _check_vocab(options.draft_vocab, model, config)
        digest = _checked_adapter_digest(options, model, num_layers)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    return Drafts(
        name=name or _description(options, num_layers),
        exit_layer=options.exit_layer,
        num_speculative_tokens=options.num_speculative_tokens,
        draft_quantization=options.draft_quantization,
        has_all_layers=options.exit_layer == num_layers,
        reuses=options.reuse_exit_states,
        config=_explicit_config(options, num_layers),
        adapter_digest=digest,
    )


def _refuse_other_methods(request: Mapping[str, Any], source: str) -> None:
    for key in _OTHER_METHODS:
        if key in request:
            raise UserError(
                f"{source}: {key}={request[key]!r} cannot be used: these are LayerSkip's own "
                f"drafts. Valid keys are {', '.join(_KEYS)}. Leave {key} out, and name other "
                "methods with --modes."
            )
    is_synthetic = request.get("rejection_sample_method") == "synthetic"
    for key in ("rejection_sample_method",) if is_synthetic else _SYNTHETIC:
        if key in request:
            raise UserError(
                f"{source}: {key}={request[key]!r} sets acceptance, which is what real prompts "
                "measure. Leave it out."
            )


def _check_vocab(file: OptionPath | None, model: Path, config: Mapping[str, Any]) -> None:
    if file is not None:
        read_draft_vocab(_path(file, model), file.source, config["vocab_size"])


def _checked_adapter_digest(options: LayerSkipOptions, model: Path, num_layers: int) -> str | None:
    folder = options.draft_adapter
    if folder is None:
        return None
    from transformers import AutoConfig

    adapter = read_draft_adapter(
        _path(folder, model),
        folder.source,
        hf_config=AutoConfig.from_pretrained(model),
        base_name=str(model),
        base_folder=model,
        num_layers=num_layers,
        exit_layer=options.exit_layer,
    )
    return adapter.digest


def _path(named: OptionPath, model: Path) -> Path:
    return model / named.path if named.in_checkpoint else Path(named.path).expanduser()


def _explicit_config(options: LayerSkipOptions, num_layers: int) -> dict[str, Any]:
    """Nothing is left to the checkpoint but the places of its own files."""
    config: dict[str, Any] = {
        "exit_layer": _exit_layer(options, num_layers),
        "num_speculative_tokens": options.num_speculative_tokens,
        "draft_quantization": options.draft_quantization,
    }
    for key in ("draft_adapter", "draft_vocab"):
        file: OptionPath | None = getattr(options, key)
        if file is None:
            config[key] = NONE
        elif not file.in_checkpoint:
            config[key] = file.path
    if not options.has_twin:
        config["reuse_exit_states"] = options.reuse_exit_states
    # As a result file has them: lists, not tuples.
    return config | json.loads(json.dumps(dict(options.vllm_options)))


def _exit_layer(options: LayerSkipOptions, num_layers: int) -> int | str:
    return ALL if options.exit_layer == num_layers else options.exit_layer


def _description(options: LayerSkipOptions, num_layers: int) -> str:
    parts = [f"E = {_exit_layer(options, num_layers)}", f"K = {options.num_speculative_tokens}"]
    if options.draft_quantization != NONE:
        parts.append(options.draft_quantization)
    parts += [
        what.replace("_", " ")
        for what in ("draft_adapter", "draft_vocab")
        if getattr(options, what) is not None
    ]
    return ", ".join(parts)
