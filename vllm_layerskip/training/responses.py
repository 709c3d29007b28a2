# SPDX-License-Identifier: Apache-2.0
"""Where in a chat's text the assistant speaks.

A response is what the model has to write: it begins where the generation prompt ends, and ends with
its closing token. The template marks responses itself (``{% generation %}``), or they are found by
comparing what it makes of the chat's beginnings.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from vllm_layerskip.chats.chat import Chat

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_STAND_IN = "STANDS-IN-FOR-A-MESSAGE"
"""A content that no template changes, to see what stands around it."""
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
_FIRST_MARK = 0xE000
"""Unicode's characters for private use begin here."""


class Span(NamedTuple):
    """A range of characters."""

    begin: int
    stop: int


def response_spans(chat: Chat, text: str) -> list[Span]:
    """Ranges of what the assistant says, closing tokens included; roles' headers are not.

    Args:
        text: the chat's, without a generation prompt.

    Raises:
        ValueError: the template changes earlier messages when later ones follow, and does not mark
            what the assistant says.
    """
    _check_roles(chat)
    marked = _marked_spans(chat, text)
    if marked is not None:
        return marked
    end = _end_of_text(chat)
    found = (
        _span(chat, place, text, end)
        for place, message in enumerate(chat.messages)
        if message["role"] == "assistant"
    )
    return [span for span in found if span.begin < span.stop]


def _check_roles(chat: Chat) -> None:
    """Refuse a chat of other names for roles: nothing of it would be trained.

    Raises:
        ValueError: the assistant has another name, by all appearances.
    """
    roles = [message["role"] for message in chat.messages]
    unknown = sorted(set(roles) - _ROLES)
    if "assistant" not in roles and unknown:
        raise ValueError(
            f"no message has the role 'assistant', and there are the roles {', '.join(unknown)}. "
            "Name the roles as OpenAI does: system, user, assistant, tool."
        )


def _end_of_text(chat: Chat) -> str:
    """The end-of-sequence token, if the template ends each text with it, and not each message.

    Phi-3's does.
    """
    end = chat.tokenizer.eos_token
    said = [chat.message("user", _STAND_IN), chat.message("assistant", _STAND_IN)]
    try:
        one, two = chat.text(said[:1]), chat.text(said)
    except ValueError:  # Some refuse a chat without a system prompt.
        return ""
    return end if end and one.endswith(end) and two.count(end) == 1 else ""


def _marked_spans(chat: Chat, text: str) -> list[Span] | None:
    """What the template marks; None if it marks nothing.

    The blocks become characters of the text. transformers' ``return_assistant_tokens_mask`` counts
    characters instead, and is wrong about a block within a macro.
    """
    if not chat.template or not _GENERATION.search(_COMMENT.sub("", chat.template)):
        return None
    begin, end = _unused_characters(text)
    template = _GENERATION.sub(
        lambda tag: f"{{%{tag[1]} if true %}}{end if tag[2] else begin}{{% endif {tag[3]}%}}",
        chat.template,
    )
    marked = chat.text(template=template)
    if marked.replace(begin, "").replace(end, "") != text:
        return None
    header, closing = _generation_prompt(chat), _closing(chat)
    spans, place = [], 0
    for piece in re.split(f"({begin}[^{end}]*{end})", marked):
        size = len(piece.strip(begin + end))
        if piece.startswith(begin):
            spans.append(_adjusted(chat, text, Span(place, place + size), header, closing))
        place += size
    return [span for span in spans if span.begin < span.stop]


def _closing(chat: Chat) -> str:
    """What the template writes after a response, without the line end."""
    said = [chat.message("user", "a"), chat.message("assistant", _STAND_IN)]
    try:
        return chat.text(said).rpartition(_STAND_IN)[2].rstrip()
    except ValueError:
        return ""


def _adjusted(chat: Chat, text: str, span: Span, header: str, closing: str) -> Span:
    """A marked range without its header, which some templates mark, up to the closing token."""
    begin, stop = span
    if header and text.startswith(header, begin, stop):
        begin += len(header)
    end, said = chat.tokenizer.eos_token, text[begin:stop].rstrip()
    if end and said.endswith(end):
        stop = begin + len(said)
    elif end and text.startswith(end, stop):
        stop += len(end)
    elif closing and not said.endswith(closing) and text.startswith(closing, stop):
        stop += len(closing)
    return Span(begin, stop)


def _unused_characters(text: str) -> tuple[str, str]:
    used = set(text)
    unused = (chr(i) for i in range(_FIRST_MARK, _FIRST_MARK + len(used) + 2) if chr(i) not in used)
    return next(unused), next(unused)


def _span(chat: Chat, place: int, text: str, end: str) -> Span:
    """The range of the message at a place.

    Args:
        end: what the template writes at the end of every text.
    """
    after = chat.text(chat.messages[: place + 1]).removesuffix(end)
    if not text.startswith(after):
        raise ValueError(_CHANGES)
    stand_in = chat.message("assistant", _STAND_IN)
    beginning = chat.text([*chat.messages[:place], stand_in]).removesuffix(end)
    header, _, closing = beginning.rpartition(_STAND_IN)
    begin = _begin(chat, place, after, header, end)
    # A line end after the closing token is the template's.
    stop = len(after.rstrip()) if closing.strip() else len(after)
    return Span(begin, stop)


def _begin(chat: Chat, place: int, after: str, header: str, end: str) -> int:
    """Where a response begins.

    Args:
        after: the text up to the end of the response.
        header: the text up to a response that is nothing but content.
    """
    before = ""
    if place:
        before = chat.text(chat.messages[:place]).removesuffix(end)
        prompt = chat.text(chat.messages[:place], add_generation_prompt=True)
        if prompt != before and after.startswith(prompt):
            return len(prompt)
    else:
        # Templates refuse a chat without messages, so its generation prompt is searched for.
        prompt = _generation_prompt(chat)
        begin = header.rfind(prompt) + len(prompt)
        if prompt and prompt in header and after.startswith(header[:begin]):
            return begin
    # There is no generation prompt, or a turn of the past does not show it (one that ends with
    # <think>): the response follows its header.
    begin = len(os.path.commonprefix([after, header]))
    if not after.startswith(before) or begin < len(before):
        raise ValueError(_CHANGES)
    return begin


def _generation_prompt(chat: Chat) -> str:
    """What ``add_generation_prompt`` adds; nothing if the template does not know it."""
    for messages in ([chat.message("user", _STAND_IN)], chat.messages):
        try:
            before = chat.text(messages).removesuffix(_end_of_text(chat))
            prompt = chat.text(messages, add_generation_prompt=True)
        except ValueError:  # Some refuse a chat without a system prompt, others one that is over.
            continue
        if prompt.startswith(before) and prompt != before:
            return prompt[len(before) :]
    return ""


_CHANGES = (
    "the chat template changes earlier messages when later ones follow, so the responses cannot be "
    "told from the rest. Set data.loss_on: all, or give a template that marks responses with "
    "{% generation %}."
)
