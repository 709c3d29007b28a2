# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint that a user names."""

from __future__ import annotations

from typing import Any

from vllm_layerskip.errors import UserError, first_line


def load_tokenizer(name: str, source: str, **options: Any) -> Any:
    """transformers' tokenizer of ``name``, a folder or a name on the model hub.

    Args:
        source: the option or key that holds the name, for messages.
        options: for ``AutoTokenizer.from_pretrained``.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} {name}: no tokenizer could be read ({first_line(error)}). Give a folder "
            "with the tokenizer's files, or a name on the model hub."
        ) from None


def stop_token_ids(name: str, otherwise: int | list[int] | None) -> tuple[int, ...]:
    """What ends a checkpoint's answers, by its generation_config.json, in ascending order.

    Args:
        otherwise: the ids where the checkpoint has no such file.
    """
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        ends = otherwise
    ids = ends if isinstance(ends, list) else [ends]
    return tuple(sorted({token for token in ids if token is not None}))
