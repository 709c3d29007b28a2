# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters of a row: those of the command line, changed by the row's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Text = Annotated[str, Field(min_length=1)]


class SamplingParameters(BaseModel):
    """Those of vLLM's ``SamplingParams`` that a row may set; each description is the valid set.

    They are what vLLM allows with speculation: it refuses ``min_p`` and ``logit_bias``.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    temperature: float = Field(0.0, ge=0, description="a number of at least 0")
    top_p: float = Field(1.0, ge=1e-9, le=1, description="a number above 0, at most 1")
    top_k: int = Field(0, ge=0, description="an integer of at least 0; 0 for all tokens")
    max_tokens: int = Field(256, ge=1, description="an integer of at least 1")
    min_tokens: int = Field(0, ge=0, description="an integer of at least 0")
    stop: list[Text] | None = Field(None, description="a list of texts, none of them empty")
    stop_token_ids: list[int] | None = Field(None, description="a list of token ids")
    ignore_eos: bool = Field(False, description="true or false")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="an integer of 64 bits")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: float = Field(1.0, ge=1e-9, description="a number above 0")


def merged(
    defaults: Mapping[str, Any], own: Any, source: str = "sampling_params"
) -> dict[str, Any]:
    """All parameters of a row.

    Every row has the same keys: Ray Data stores rows in columns, so a key that only some rows had
    would reach the others as None.

    Args:
        defaults: for all rows.
        own: the row's ``sampling_params``; None for none.
        source: where the values come from, for messages.

    Raises:
        ValueError: a parameter is unknown or has no valid value; the message names it.
    """
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(f"{source} must be an object, not {own!r}.")
    given = {**defaults, **(own or {})}
    try:
        values = SamplingParameters.model_validate(given).model_dump()
    except ValidationError as error:
        raise ValueError(f"{source}: {_problem(given, error)}") from None
    if values["min_tokens"] > values["max_tokens"]:
        raise ValueError(
            f"{source}: min_tokens={values['min_tokens']} must be at most "
            f"max_tokens={values['max_tokens']}."
        )
    return values


def _problem(given: Mapping[str, Any], error: ValidationError) -> str:
    fields = SamplingParameters.model_fields
    unknown = next((name for name in given if name not in fields), None)
    if unknown is not None:
        return f"{unknown!r} is not supported. Valid are {', '.join(fields)}."
    name = str(error.errors(include_url=False)[0]["loc"][0])
    return f"{name}={given[name]!r} must be {fields[name].description}."
