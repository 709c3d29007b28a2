# SPDX-License-Identifier: Apache-2.0
"""Types of arguments that several subcommands take."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def checkpoint(text: str) -> str:
    """The type of an option that takes a checkpoint's folder or its name on the model hub.

    Raises:
        ArgumentTypeError: it can only be a folder, and there is none.
    """
    if not text or (text.startswith(("/", "./", "../", "~")) and not Path(text).exists()):
        raise argparse.ArgumentTypeError(
            f"{text!r}: there is no such folder. Give one with config.json, or a name on the "
            "model hub"
        )
    return text


def add_dtype_and_device(group: argparse._ArgumentGroup) -> None:
    """The options of engines that have these defaults."""
    group.add_argument("--dtype", default=None, help="Default: auto; float32 on a CPU.")
    group.add_argument("--device", choices=("cuda", "cpu"), help="Default: cuda if there is a GPU.")


def engine_args(text: str) -> dict[str, Any]:
    """The type of ``--engine-args``, a JSON object of arguments of vLLM's ``LLM``.

    Raises:
        ArgumentTypeError: the text is something else, or its tensor_parallel_size is no number.
    """
    value = json_object(text)
    size = value.get("tensor_parallel_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise argparse.ArgumentTypeError(
            f"tensor_parallel_size={size!r} must be an integer of at least 1"
        )
    return value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object")
    return value
