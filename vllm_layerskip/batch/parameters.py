# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters of a row: those of the command line, changed by the row's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """One of vLLM's ``SamplingParams`` that a row may set."""

    default: Any
    valid: str
    is_valid: Callable[[Any], bool]


def _number(low: float, high: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    )


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and value >= low
    )  # fmt: skip


def _list_of(kind: type) -> Callable[[Any], bool]:
    def is_valid(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is kind and item != "" for item in value)

    return is_valid


def _optional(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


PARAMETERS: dict[str, Parameter] = {
    "temperature": Parameter(0.0, "a number of at least 0", _number(0)),
    "top_p": Parameter(1.0, "a number above 0, at most 1", _number(1e-9, 1)),
    "top_k": Parameter(0, "an integer of at least 0; 0 for all tokens", _integer(0)),
    "max_tokens": Parameter(256, "an integer of at least 1", _integer(1)),
    "min_tokens": Parameter(0, "an integer of at least 0", _integer(0)),
    "stop": Parameter(None, "a list of texts", _optional(_list_of(str))),
    "stop_token_ids": Parameter(None, "a list of token ids", _optional(_list_of(int))),
    "ignore_eos": Parameter(False, "true or false", lambda value: isinstance(value, bool)),
    "seed": Parameter(None, "an integer", _optional(_integer(-(2**63)))),
    "presence_penalty": Parameter(0.0, "a number from -2 to 2", _number(-2, 2)),
    "frequency_penalty": Parameter(0.0, "a number from -2 to 2", _number(-2, 2)),
    "repetition_penalty": Parameter(1.0, "a number above 0", _number(1e-9)),
}
"""What vLLM allows with speculation; `min_p` and `logit_bias` it refuses."""


def merged(defaults: Mapping[str, Any], own: Any) -> dict[str, Any]:
    """All parameters of a row.

    Every row has the same keys: Ray Data stores rows in columns, and a key that only some rows had
    would reach the others as None.

    Args:
        defaults: for all rows.
        own: the row's ``sampling_params``; None for none.

    Raises:
        ValueError: a parameter is unknown or has no valid value; the message names it.
    """
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(f"sampling_params must be an object, not {own!r}.")
    values = {name: parameter.default for name, parameter in PARAMETERS.items()}
    for name, value in {**defaults, **(own or {})}.items():
        if name not in PARAMETERS:
            raise ValueError(
                f"sampling_params: {name!r} is not supported. Valid are {', '.join(PARAMETERS)}."
            )
        if not PARAMETERS[name].is_valid(value):
            raise ValueError(f"sampling_params: {name}={value!r} must be {PARAMETERS[name].valid}.")
        values[name] = value
    if values["min_tokens"] > values["max_tokens"]:
        raise ValueError(
            f"sampling_params: min_tokens={values['min_tokens']} must be at most "
            f"max_tokens={values['max_tokens']}."
        )
    return values
