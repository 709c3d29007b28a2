# SPDX-License-Identifier: Apache-2.0
"""The errors by which transformers says that it cannot read a checkpoint's config or tokenizer."""

from __future__ import annotations


def unreadable() -> tuple[type[Exception], ...]:
    """For ``except``: no such file or name, no valid JSON, values that do not go together, or a
    damaged file of weights."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # The last two where a file's JSON is no object.
    return OSError, ValueError, StrictDataclassError, SafetensorError, TypeError, AttributeError
