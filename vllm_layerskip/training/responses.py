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
_STAND_IN = "STANDS-IN-FOR-A-MESSAGE"
"""A content that no template changes, to see what stands around it."""
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
    marked = _marked_spans(chat, text)
    if marked is not None:
        return marked
    found = (
        _span(chat, place, text)
        for place, message in enumerate(chat.messages)
        if message["role"] == "assistant"
    )
    return [span for span in found if span.begin < span.stop]


def _marked_spans(chat: Chat, text: str) -> list[Span] | None:
    """What the template marks; None if it marks nothing.

    The blocks become characters of the text. transformers' ``return_assistant_tokens_mask`` counts
    characters instead, and is wrong about a block within a macro.
    """
    if not chat.template or not _GENERATION.search(chat.template):
        return None
    begin, end = _unused_characters(text)
    template = _GENERATION.sub(
        lambda tag: f"{{%{tag[1]} if true %}}{end if tag[2] else begin}{{% endif {tag[3]}%}}",
        chat.template,
    )
    marked = chat.text(template=template)
    if marked.replace(begin, "").replace(end, "") != text:
        return None
    header, spans, place = _generation_prompt(chat), [], 0
    for piece in re.split(f"({begin}[^{end}]*{end})", marked):
        size = len(piece.strip(begin + end))
        if piece.startswith(begin):
            spans.append(_adjusted(chat, text, Span(place, place + size), header))
        place += size
    return [span for span in spans if span.begin < span.stop]


def _adjusted(chat: Chat, text: str, span: Span, header: str) -> Span:
    """A marked range without its header, which some templates mark, up to the closing token."""
    begin, stop = span
    if header and text.startswith(header, begin, stop):
        begin += len(header)
    end, said = chat.tokenizer.eos_token, text[begin:stop].rstrip()
    if end and said.endswith(end):
        stop = begin + len(said)
    elif end and text.startswith(end, stop):
        stop += len(end)
    return Span(begin, stop)


def _unused_characters(text: str) -> tuple[str, str]:
    used = set(text)
    unused = (chr(i) for i in range(_FIRST_MARK, _FIRST_MARK + len(used) + 2) if chr(i) not in used)
    return next(unused), next(unused)


def _span(chat: Chat, place: int, text: str) -> Span:
    """The range of the message at a place."""
    after = chat.text(chat.messages[: place + 1])
    if not text.startswith(after):
        raise ValueError(_CHANGES)
    stand_in = chat.message("assistant", _STAND_IN)
    header, _, closing = chat.text([*chat.messages[:place], stand_in]).rpartition(_STAND_IN)
    begin = _begin(chat, place, after, header)
    # A line end after the closing token is the template's.
    stop = len(after.rstrip()) if closing.strip() else len(after)
    return Span(begin, stop)


def _begin(chat: Chat, place: int, after: str, header: str) -> int:
    """Where a response begins.

    Args:
        after: the text up to the end of the response.
        header: the text up to a response that is nothing but content.
    """
    before = ""
    if place:
        before = chat.text(chat.messages[:place])
        prompt = chat.text(chat.messages[:place], add_generation_prompt=True)
        if prompt != before and after.startswith(prompt):
            return len(prompt)
    else:
        # Templates refuse a chat without messages, so its generation prompt is searched for.
        prompt = _generation_prompt(chat)
        end = header.rfind(prompt) + len(prompt)
        if prompt and prompt in header and after.startswith(header[:end]):
            return end
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
            before = chat.text(messages)
            prompt = chat.text(messages, add_generation_prompt=True)
        except ValueError:  # Some refuse a chat without a system prompt, others one that is over.
            continue
        if prompt.startswith(before) and prompt != before:
            return prompt[len(before) :]
    return ""


_CHANGES = (
    "the chat template changes earlier messages when later ones follow, so the responses cannot be "
    "told from the rest. Set data.loss_on: all, give chats with one response, or give a template "
    "that marks them with {% generation %}."
)
