# SPDX-License-Identifier: Apache-2.0
"""The errors by which transformers says that it cannot read a checkpoint's config or tokenizer."""

from __future__ import annotations


def unreadable() -> tuple[type[Exception], ...]:
    """For ``except``: no such file or name, no valid JSON, or values that do not go together."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, StrictDataclassError
