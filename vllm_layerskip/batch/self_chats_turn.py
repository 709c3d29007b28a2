# SPDX-License-Identifier: Apache-2.0
"""How a chat template begins the first user's turn, and which token ends it.

A model that was trained on chats has seen that beginning before every first question, so it goes on
with one (arXiv 2406.08464). The template is asked with a stand-in for the question, as
``training.responses`` asks it for answers: what stands around it is the template's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.chats.chat import read_chat

_STAND_IN = "Stands-in-for-a-Question"
"""A content that only a template which changes contents changes."""
_PROBES = (_STAND_IN, "What", "a", "7", "É")
"""Contents that begin with different tokens."""


@dataclass(frozen=True)
class UserTurn:
    """The tokens around a first question."""

    prefix: tuple[int, ...]
    """All tokens before it."""
    close: int
    """The token that ends it."""
    special: frozenset[int]
    """Tokens that no text is made of."""


def user_turn(tokenizer: Any, system: str | None = None) -> UserTurn:
    """What the tokenizer's chat template writes around a first question.

    Raises:
        ValueError: there is no template, it refuses the chat, changes the question, has other text
            behind it, or closes it with no token of its own.
    """
    before, after = _around(tokenizer, system)
    prefix = _prefix(tokenizer, [before + probe + after for probe in _PROBES])
    if not prefix:
        raise ValueError("the chat template writes nothing before a user's message.")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return UserTurn(prefix, _close(tokenizer, after), frozenset(special))


def first_messages(question: str, system: str | None) -> list[dict[str, str]]:
    """A chat that begins with this question."""
    asked = [{"role": "user", "content": question}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]


def _around(tokenizer: Any, system: str | None) -> tuple[str, str]:
    """The texts before and behind a question, up to where the assistant's answer begins."""
    chat = read_chat(tokenizer, first_messages(_STAND_IN, system))
    if chat.template is None:
        raise ValueError("the tokenizer makes no texts of chats (mistral_common's).")
    text = chat.text(add_generation_prompt=True)
    if text.count(_STAND_IN) != 1:
        raise ValueError("the chat template does not write a user's message once and as it is.")
    before, _, after = text.partition(_STAND_IN)
    return before, after


def _prefix(tokenizer: Any, texts: list[str]) -> tuple[int, ...]:
    """The tokens that do not depend on the question, without a blank at their end.

    What stands right before a question may be part of its first token (" What" after "[INST]"),
    which the model then has to write. It never saw the blank alone.
    """
    prefix = list(os.path.commonprefix([_token_ids(tokenizer, text) for text in texts]))
    while prefix and not tokenizer.decode(prefix[-1:]).strip(" "):
        prefix.pop()
    return tuple(prefix)


def _close(tokenizer: Any, after: str) -> int:
    """The first token of the template's own behind a question; only blanks may stand before it."""
    own = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    ids = _token_ids(tokenizer, after)
    place = next((place for place, token in enumerate(ids) if token in own), None)
    if place is None:
        raise ValueError(
            "the chat template closes a user's message with no token of its own (such as "
            "<|im_end|>), so nothing would end a question."
        )
    if between := tokenizer.decode(ids[:place]).strip():
        raise ValueError(
            f"the chat template writes a text of its own ({between!r:.60}) behind a user's message."
        )
    return ids[place]


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
