# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and stop tokens of a checkpoint that a user names."""

from __future__ import annotations

from typing import Any

from vllm_layerskip.errors import UserError, one_line
from vllm_layerskip.files.unreadable import unreadable


def load_tokenizer(name: str, source: str, **options: Any) -> Any:
    """Load transformers' tokenizer of a checkpoint.

    Args:
        name: a folder, or a name on the model hub.
        source: the option or key that holds the name, for messages.
        options: for ``AutoTokenizer.from_pretrained``.

    Raises:
        UserError: no tokenizer can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except unreadable() as error:
        raise UserError(
            f"{source} {name}: no tokenizer could be read ({one_line(error).rstrip('.')}). Give a "
            "folder with the tokenizer's files, or a name on the model hub."
        ) from None


def stop_token_ids(name: str, otherwise: int | list[int] | None) -> tuple[int, ...]:
    """The ids in a checkpoint's generation_config.json that end an answer, ascending.

    Args:
        name: a folder, or a name on the model hub.
        otherwise: the ids if the checkpoint has no such file.
    """
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        ends = otherwise
    ids = ends if isinstance(ends, list) else [ends]
    return tuple(sorted({token for token in ids if token is not None}))
