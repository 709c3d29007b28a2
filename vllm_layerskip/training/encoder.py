# SPDX-License-Identifier: Apache-2.0
"""Texts, chats and prompt-response pairs as token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vllm_layerskip.chats.chat import read_chat
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.records import NO_UNICODE, is_unicode
from vllm_layerskip.training.config import DataConfig
from vllm_layerskip.training.loss import IGNORED
from vllm_layerskip.training.responses import Span, response_spans

_TOOLS_FIELD = "tools"
"""Beside a chat's messages, as in the requests of a server."""


class Encoded(NamedTuple):
    """Token ids of a document, and labels: the same ids, or -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


class Encoder:
    """Records to token ids: a text, a chat's messages, or a prompt and its response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.tokenizer: it has no end-of-sequence token, which has to stand between "
                "documents. Set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.data = data

    def encode(self, record: Any, where: str) -> Encoded:
        """A record's token ids and labels.

        Raises:
            UserError: the record has none of the three forms, or the form lacks something.
        """
        data = self.data
        record = record if isinstance(record, Mapping) else {}
        prompt, response = record.get(data.prompt_field), record.get(data.response_field)
        try:
            if record.get(data.messages_field):
                return self._encode_chat(record[data.messages_field], record.get(_TOOLS_FIELD))
            if isinstance(prompt, str) and isinstance(response, str):
                return self._encode_pair(
                    _checked(prompt, data.prompt_field), _checked(response, data.response_field)
                )
            text = record.get(data.text_field, record.get("text"))
            if isinstance(text, str):
                return self._encode_text(_checked(text, data.text_field))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        raise UserError(
            f"{where}: there is no text in {data.text_field!r}, no list in "
            f"{data.messages_field!r}, and no texts in {data.prompt_field!r} and "
            f"{data.response_field!r}. Correct it, or name the fields with data.text_field, "
            "data.messages_field, data.prompt_field and data.response_field."
        )

    def _encode_text(self, text: str) -> Encoded:
        ids = self._with_end(self.tokenizer(text, verbose=False).input_ids)
        return Encoded(ids, list(ids))

    def _encode_pair(self, prompt: str, response: str) -> Encoded:
        before = self.tokenizer(prompt, verbose=False).input_ids
        if before and before[-1] == self.tokenizer.eos_token_id:
            before = before[:-1]  # Some tokenizers end every text by themselves.
        answer = self.tokenizer(response, add_special_tokens=False, verbose=False).input_ids
        ids = before + self._with_end(answer)
        trained_from = len(before) if self.data.loss_on == "responses" else 0
        return Encoded(ids, [IGNORED] * trained_from + ids[trained_from:])

    def _encode_chat(self, messages: Any, tools: Any) -> Encoded:
        tokenizer, only_responses = self.tokenizer, self.data.loss_on == "responses"
        if not tokenizer.chat_template or not tokenizer.is_fast:
            raise ValueError(
                "chats need a fast tokenizer with a chat template, and this one is none. Name "
                "another in model.tokenizer, or use prompts and responses."
            )
        chat = read_chat(tokenizer, messages, tools)
        text = chat.text()
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = list(encoded.input_ids), encoded.offset_mapping
        labels = list(ids)
        if only_responses:
            spans = response_spans(chat, text)
            trained = [_is_within(start, stop, spans, text) for start, stop in offsets]
            labels = [i if on else IGNORED for i, on in zip(ids, trained, strict=True)]
        end = tokenizer.eos_token_id
        # A template closes a response with its own token, which may be followed by a line end.
        closed_at = [stop for i, (_, stop) in zip(ids, offsets, strict=True) if i == end]
        if not closed_at or text[closed_at[-1] :].strip():
            ids.append(end)
            ends_a_response = chat.messages[-1]["role"] == "assistant"
            labels.append(end if ends_a_response or not only_responses else IGNORED)
        return Encoded(ids, labels)

    def _with_end(self, ids: Sequence[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [*ids] if ids and ids[-1] == end else [*ids, end]


def _checked(text: str, field: str) -> str:
    if not is_unicode(text):
        raise ValueError(f"{field}: {NO_UNICODE}")
    return text


def _is_within(start: int, stop: int, spans: Iterable[Span], text: str) -> bool:
    """Whether a token of these characters belongs to a response.

    One that also has the blank before the response in it does: " yes" after "[/INST]".
    """
    return start < stop and any(
        begin <= start < end or (start < begin < stop and text[start:begin].isspace())
        for begin, end in spans
    )
