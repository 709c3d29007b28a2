# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters of a row: those of the command line, changed by the row's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_layerskip.batch.values import brief, texts_in
from vllm_layerskip.files.records import NO_UNICODE, is_unicode, without_nulls

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class SamplingParameters(BaseModel):
    """Those of vLLM's ``SamplingParams`` that a row may set; each description is the valid set.

    They are what vLLM allows with speculation: it refuses ``min_p`` and ``logit_bias``. A value
    that vLLM would refuse only in the middle of its work (or not at all, and then fail for all
    requests) is outside of the valid set.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    temperature: float = Field(0.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, ge=1e-9, le=1, description="a number above 0, at most 1")
    top_k: int = Field(
        0, ge=0, lt=2**31, description="an integer from 0 to 2147483647; 0 for all tokens"
    )
    # A worker adds the prompt's length to it, in 32 bits.
    max_tokens: int = Field(256, ge=1, le=10**9, description="an integer from 1 to 1000000000")
    min_tokens: int = Field(0, ge=0, le=10**9, description="an integer from 0 to 1000000000")
    stop: list[Text] | None = Field(
        None, description="a text or a list of texts, none of them empty"
    )
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=100, description="a list of at most 100 token ids"
    )
    ignore_eos: bool = Field(False, description="true or false")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="an integer of 64 bits")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: float = Field(
        1.0, ge=1e-9, le=1e6, description="a number above 0, at most 1000000"
    )


def merged(
    defaults: Mapping[str, Any], own: Any, source: str = "sampling_params"
) -> dict[str, Any]:
    """All parameters of a row. A null is a parameter that is not given.

    Every row has the same keys: Ray Data stores rows in columns, so a key that only some rows had
    would reach the others as None.

    Args:
        defaults: for all rows.
        own: the row's ``sampling_params``, OpenAI's forms included; None for none.
        source: where the values come from, for messages.

    Raises:
        ValueError: a parameter is unknown or has no valid value; the message names it.
    """
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(f"{source} must be an object, not {brief(own)}.")
    given = {name: value for name, value in defaults.items() if value is not None}
    given |= _vllms_form(without_nulls(own or {}), source)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if not all(map(is_unicode, texts_in(given.get("stop")))):
        raise ValueError(f"{source}: stop: {NO_UNICODE}")
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


def _vllms_form(own: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The row's parameters with vLLM's name for OpenAI's ``max_completion_tokens``, and one form
    of ``top_k``."""
    given = dict(own)
    if given.get("top_k") == -1:  # vLLM's other form of "all tokens".
        given["top_k"] = 0
    if "max_completion_tokens" in given:
        number = given.pop("max_completion_tokens")
        if given.setdefault("max_tokens", number) != number:
            raise ValueError(
                f"{source}: max_completion_tokens={brief(number)} and "
                f"max_tokens={brief(given['max_tokens'])} contradict each other. Give one of them."
            )
    return given


def _problem(given: Mapping[str, Any], error: ValidationError) -> str:
    fields = SamplingParameters.model_fields
    unknown = next((name for name in given if name not in fields), None)
    if unknown is not None:
        return f"{brief(unknown)} is not supported. Valid are {', '.join(fields)}."
    name = str(error.errors(include_url=False)[0]["loc"][0])
    return f"{name}={brief(given[name])} must be {fields[name].description}."
