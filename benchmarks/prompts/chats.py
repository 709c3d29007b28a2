# SPDX-License-Identifier: Apache-2.0
"""A question's turns as the token ids that a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.chats.chat import chat_token_ids


@dataclass(frozen=True)
class Chats:
    """Turns and answers through a tokenizer; the chat template is used if ``chat``."""

    tokenizer: Any
    chat: bool

    def token_ids(self, turns: Sequence[str], answers: Sequence[Sequence[int]] = ()) -> list[int]:
        """The prompt of the last of ``turns``; ``answers`` are the token ids of those before it.

        Without a chat template an answer follows its turn directly, and an empty line and the next
        turn follow it.
        """
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        if self.chat:
            messages = [{"role": "user", "content": turns[0]}]
            for answer, turn in zip(texts, turns[1:], strict=True):
                messages.append({"role": "assistant", "content": answer})
                messages.append({"role": "user", "content": turn})
            return chat_token_ids(self.tokenizer, messages)
        parts = [f"{a}\n\n{turn}" for a, turn in zip(texts, turns[1:], strict=True)]
        return list(self.tokenizer("".join([turns[0], *parts]), verbose=False)["input_ids"])
