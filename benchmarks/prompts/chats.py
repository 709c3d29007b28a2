# SPDX-License-Identifier: Apache-2.0
"""A question's turns as the token ids that a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
            prompt = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        else:
            parts = [f"{a}\n\n{turn}" for a, turn in zip(texts, turns[1:], strict=True)]
            prompt = "".join([turns[0], *parts])
        # A chat template writes its own special tokens.
        return list(
            self.tokenizer(prompt, add_special_tokens=not self.chat, verbose=False)["input_ids"]
        )
