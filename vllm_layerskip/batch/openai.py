# SPDX-License-Identifier: Apache-2.0
"""Rows in the form of OpenAI's batch files, which ``vllm run-batch`` takes, too:
``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_layerskip.batch.values import brief

_URLS = ("/v1/chat/completions", "/v1/completions")
_PROMPTS = ("messages", "prompt")
_WITHOUT_EFFECT = ("model", "user", "metadata", "store")
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "logprobs": (False,),
    "echo": (False,),
    "tool_choice": ("auto", "none"),
}
"""Parameters that may be given, but have these values only."""


def is_request(record: Mapping[str, Any]) -> bool:
    """Whether a row has the form: its prompt is in ``body``."""
    body = record.get("body")
    return isinstance(body, Mapping) and any(body.get(key) is not None for key in _PROMPTS)


def row_of(record: Mapping[str, Any], text_field: str) -> dict[str, Any]:
    """The same row in our own form; what is no part of the request stays as it is.

    Args:
        text_field: our column for texts.

    Raises:
        ValueError: the request is one that ``generate`` does not answer.
    """
    method, url = record.get("method"), record.get("url")
    if method not in (None, "POST"):
        raise ValueError(f"method={brief(method)} must be 'POST'.")
    if url is not None and url not in _URLS:
        raise ValueError(f"url={brief(url)} must be {' or '.join(_URLS)}.")
    body = {key: value for key, value in record["body"].items() if value is not None}
    row = {key: record[key] for key in record if key not in ("method", "url", "body")}
    for key in ("messages", "tools"):
        if key in body:
            row[key] = body.pop(key)
    if "prompt" in body:
        prompt = body.pop("prompt")
        row["prompt_token_ids" if _is_token_ids(prompt) else text_field] = prompt
    for key, valid in _ONLY.items():
        if body.pop(key, valid[0]) not in valid:
            raise ValueError(f"body: {key} must be {' or '.join(map(repr, valid))}. Leave it out.")
    row["sampling_params"] = {k: v for k, v in body.items() if k not in _WITHOUT_EFFECT}
    return row


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(i, int) for i in prompt)
