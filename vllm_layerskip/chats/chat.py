# SPDX-License-Identifier: Apache-2.0
"""Chats as the text and token ids that a model gets: the one place that renders them.

They are rendered as ``vllm serve`` does it, by the tokenizer's template on messages and tools that
are brought into one form. Nothing here needs vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.chats.content_format import ContentFormat, content_format
from vllm_layerskip.chats.messages import Message, as_system, template_messages, template_tools
from vllm_layerskip.errors import first_line
from vllm_layerskip.files.records import NO_UNICODE, is_unicode, without_nulls


@dataclass(frozen=True)
class Chat:
    """A chat in the form that its tokenizer's template takes (``read_chat`` makes it)."""

    tokenizer: Any
    template: str | None
    """Of the tokenizer; None if it makes tokens of chats without one."""
    content_format: ContentFormat
    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None

    def message(self, role: str, text: str) -> Message:
        (message,) = template_messages([{"role": role, "content": text}], self.content_format)
        return message

    def text(
        self,
        messages: Sequence[Message] | None = None,
        *,
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        """What the template makes of it.

        Args:
            messages: instead of the chat's.
            template: instead of the tokenizer's.

        Raises:
            ValueError: the template refuses the messages, or they hold what is no text.
        """
        options = {} if template is None else {"chat_template": template}
        try:
            text = self.tokenizer.apply_chat_template(
                list(self.messages if messages is None else messages),
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except Exception as error:
            # A template is a program: odd messages end in Jinja's errors, KeyError, TypeError...
            raise ValueError(_refusal(error)) from None
        if not is_unicode(text):
            raise ValueError(f"messages: {NO_UNICODE}")
        return text


def read_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Chat:
    """A chat for a tokenizer.

    Raises:
        ValueError: there is no template, or messages or tools have a form that is not served.
    """
    schemas = template_tools(tools)
    template = _template(tokenizer, schemas)
    form = "string" if template is None else content_format(template)
    prepared = template_messages(messages, form)
    knows_developer = template is None or '"developer"' in template or "'developer'" in template
    if not knows_developer and any(message["role"] == "developer" for message in prepared):
        prepared = as_system(prepared)
    return Chat(tokenizer, template, form, tuple(prepared), schemas)


def chat_token_ids(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a chat with the generation prompt, as ``vllm serve`` makes them.

    Raises:
        ValueError: there is no template, it refuses the messages, or messages or tools have a form
            that is not served (parts that are no text).
    """
    chat = read_chat(tokenizer, messages, tools)
    if chat.template is None:
        return _without_template(chat, messages)
    # A template writes its own special tokens. The engine says whether a prompt is too long.
    text = chat.text(add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _without_template(chat: Chat, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """mistral_common's tokens, from OpenAI's messages; there is no text with the same tokens."""
    given = [without_nulls(message) for message in messages]
    try:
        return list(
            chat.tokenizer.apply_chat_template(given, tools=chat.tools, add_generation_prompt=True)
        )
    except Exception as error:  # It asserts, too.
        raise ValueError(_refusal(error)) from None


def _refusal(error: Exception) -> str:
    return (
        f"the chat template refuses these messages ({type(error).__name__}: {first_line(error)})."
    )


def _template(tokenizer: Any, tools: list[dict[str, Any]] | None) -> str | None:
    if not hasattr(tokenizer, "get_chat_template"):
        return None  # mistral_common's.
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template. Use an instruction-tuned checkpoint, or give "
            "prompts instead of messages."
        )
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # Several named templates, and none is the default.
        raise ValueError(
            f"the tokenizer has no default chat template ({first_line(error)})."
        ) from None
