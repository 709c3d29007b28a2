# SPDX-License-Identifier: Apache-2.0
"""The plugin's own environment variables."""

from __future__ import annotations

import os

ALLOW_UNTESTED = "LAYERSKIP_ALLOW_UNTESTED_VLLM"
"""Lets LayerSkip run on a vLLM that it was not tested on, if its contacts fit."""

DRAFT_GRAPHS = "LAYERSKIP_DRAFT_GRAPHS"
"""0 runs drafts without CUDA graphs and keeps verification's, to find out which are at fault."""


def flag(name: str, default: bool) -> bool:
    """The environment variable ``name``, 1 or 0.

    Raises:
        ValueError: it is neither.
    """
    value = os.environ.get(name, "1" if default else "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r} must be 1 or 0. Correct or unset it.")
    return value == "1"
