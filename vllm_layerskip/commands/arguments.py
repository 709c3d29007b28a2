# SPDX-License-Identifier: Apache-2.0
"""Types of arguments that several subcommands take."""

from __future__ import annotations

import argparse
import json
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that takes a JSON object, for argparse.

    Raises:
        ArgumentTypeError: the text is something else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object")
    return value
