# SPDX-License-Identifier: Apache-2.0
"""What a user wrote: flags and keys as one request, in one spelling.

A request is ``speculative_config`` with every flag folded in; ``options.py`` resolves and checks
it. This module is free of vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

METHOD = "layerskip"
SELF = "[self]"

OWN_KEYS = frozenset(
    {"draft_adapter", "draft_quantization", "draft_vocab", "exit_layer", "reuse_exit_states"}
)
"""Keys that vLLM does not know."""


def with_option(
    request: Mapping[str, Any] | None, key: str, value: object, flag: str
) -> dict[str, Any]:
    """``request`` with the value of one flag added.

    Raises:
        ValueError: the config has the key already.
    """
    given = _spelled(request)
    if key in given:
        raise ValueError(
            f"{flag} and --speculative-config['{key}'] are mutually exclusive. Give one."
        )
    return given | {key: value}


def speculative_request(engine_args: Any) -> dict[str, Any]:
    """``speculative_config`` with vLLM's short flags folded in, as vLLM does it.

    Raises:
        ValueError: a key was given both ways.
    """
    request = _spelled(engine_args.speculative_config)
    for flag, key, value in (
        ("--spec-method", "method", engine_args.spec_method),
        ("--spec-model", "model", engine_args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", engine_args.spec_tokens),
    ):
        if value is not None:
            request = with_option(request, key, value, flag)
    return request


def asks_for_layerskip(request: Mapping[str, Any] | None) -> bool:
    """Whether a ``speculative_config`` is ours to handle.

    Raises:
        ValueError: the request is neither wholly LayerSkip's nor wholly plain vLLM's.
    """
    if not request:
        return False
    method, model = request.get("method"), request.get("model")
    if method in (None, METHOD) and _has_lost_its_brackets(model):
        raise ValueError(
            f"speculative_config: model={model!r} must be '{SELF}', with the brackets. In a YAML "
            f'file put it in quotes (speculative-model: "{SELF}"): without them it is a list.'
        )
    if method == METHOD:
        if model not in (None, SELF):
            raise ValueError(
                f"speculative_config: model={model!r} cannot go with method='layerskip': the "
                f"draft is the target's own first layers. Leave model out or set it to '{SELF}'."
            )
        return True
    if model == SELF:
        if method is not None:
            raise ValueError(
                f"speculative_config: model='{SELF}' drafts with the target's own layers and "
                f"cannot go with method={method!r}. Leave method out or set it to 'layerskip'."
            )
        return True
    own = sorted(OWN_KEYS & request.keys())
    if own:
        raise ValueError(
            f"speculative_config: {named(request, own)} belongs to LayerSkip, but neither "
            f"method='layerskip' nor model='{SELF}' was given. Add one of them "
            f"(on the command line: --spec-model '{SELF}'), or drop the option."
        )
    return False


def _has_lost_its_brackets(model: object) -> bool:
    """Whether a model is what YAML, and vLLM's reader of YAML files, make of [self]."""
    return model == ["self"] or (model == "self" and not os.path.exists("self"))


def named(request: Mapping[str, Any], keys: list[str]) -> str:
    """Keys with their values, for messages."""
    return ", ".join(f"{key}={request[key]!r}" for key in keys)


def _spelled(request: Mapping[str, Any] | None) -> dict[str, Any]:
    """``request`` with ``_`` for ``-`` in its keys; no other code knows both spellings."""
    return {key.replace("-", "_"): value for key, value in (request or {}).items()}
