# SPDX-License-Identifier: Apache-2.0
"""Prompts to tune for, from files: Spec-Bench's questions, chats, texts, or one prompt a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_layerskip.chats.chat import chat_token_ids
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.found import record_files
from vllm_layerskip.files.records import Record, good_records, text_of, without_nulls
from vllm_layerskip.files.tokenizers import load_tokenizer, stop_token_ids
from vllm_layerskip.files.turns import is_text

TEXT_KEYS = ("prompt", "text")
OPTION = "--prompts"


@dataclass(frozen=True)
class Prompt:
    """A text or a chat, and its category if the file names one."""

    text: str
    """Empty for a chat."""
    category: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: Any = None
    """Of a chat, as ``chats.chat`` takes them."""
    where: str = field(default="", compare=False)
    """File and line, for messages."""


def read_prompts(paths: Iterable[str | Path], text_field: str | None = None) -> list[Prompt]:
    """The prompts of files (``files.records``).

    A record is a string, an object with ``prompt`` or ``text``, one with ``messages`` (a chat, with
    ``tools`` if it has some), or one with ``turns`` as Spec-Bench has it (``question_id``,
    ``category``, ``turns``), of which the first turn counts. Each line of a text file is a prompt.

    Args:
        text_field: the key of the text, and no other counts; None for those above.

    Raises:
        UserError: a file cannot be read, or holds a record that is no prompt, or there is none.
    """
    files = record_files(paths, OPTION)
    prompts = [_prompt(record, text_field) for record in good_records(files, OPTION, text="lines")]
    if not prompts:
        raise UserError(
            f"{OPTION} {' '.join(map(str, paths))}: there is no prompt in it. Give a file that "
            "holds some."
        )
    return prompts


def _prompt(record: Record, text_field: str | None) -> Prompt:
    value = without_nulls(record.value) if record.is_row else record.value
    if not isinstance(value, Mapping):
        value = {"prompt": value}
    category = value.get("category")
    category = category if isinstance(category, str) else None
    if text_field is None and isinstance(value.get("messages"), list) and value["messages"]:
        chat = tuple(value["messages"])
        return Prompt("", category, chat, value.get("tools") or None, record.where)
    texts = {"turns": _first_turn(value), **{key: value.get(key) for key in TEXT_KEYS}}
    if text_field is not None:
        texts = {text_field: value.get(text_field)}
    key = next((key for key, text in texts.items() if is_text(text)), None)
    if key is None:
        wanted = (
            f"an object with the text in {text_field!r} (--text-field)"
            if text_field is not None
            else "a string, or an object with the text in 'prompt' or 'text' (another with "
            "--text-field), in 'turns' as Spec-Bench has it, or with 'messages'"
        )
        raise UserError(f"{OPTION} {record.where}: there is no prompt. It must be {wanted}.")
    text = text_of(Record(record.where, {key: texts[key]}), OPTION, key)
    return Prompt(text, category, where=record.where)


def _first_turn(record: Mapping[str, Any]) -> Any:
    """Later turns do not matter here, so they are not checked (``turns.turns_of`` does)."""
    turns = record.get("turns")
    return turns[0] if isinstance(turns, list) and turns else None


def evenly_spaced(prompts: Sequence[Prompt], num_prompts: int) -> list[Prompt]:
    """``num_prompts`` of them at equal distances, so that each part of a file has its share."""
    num_prompts = min(num_prompts, len(prompts))
    return [prompts[index * len(prompts) // num_prompts] for index in range(num_prompts)]


@dataclass(frozen=True)
class EncodedPrompts:
    """Token ids of the prompts that are short enough."""

    token_ids: tuple[tuple[int, ...], ...]
    categories: tuple[str | None, ...]
    num_too_long: int
    stop_token_ids: tuple[int, ...]
    """Tokens that end the model's answers."""

    @property
    def longest(self) -> int:
        return max(map(len, self.token_ids))

    @property
    def mean_length(self) -> float:
        return sum(map(len, self.token_ids)) / len(self.token_ids)


def encode_prompts(
    prompts: Sequence[Prompt], model: str, max_prompt_tokens: int, chat: bool
) -> EncodedPrompts:
    """Token ids as the model's server would make them.

    Args:
        chat: texts are a user's messages, wrapped by the tokenizer's chat template.

    Raises:
        UserError: the model has no tokenizer or chat template, the template refuses a chat, or
            every prompt is too long.
    """
    tokenizer = load_tokenizer(model, "--model")
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"--chat: the tokenizer of {model} has no chat template. Leave --chat out, or use an "
            "instruction-tuned checkpoint."
        )
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    kept = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= max_prompt_tokens]
    if not kept:
        shortest = min(map(len, encoded))
        raise UserError(
            f"--max-prompt-tokens {max_prompt_tokens}: none of {len(encoded)} prompts fits; the "
            f"shortest has {shortest} tokens. Raise it, or give shorter prompts."
        )
    return EncodedPrompts(
        token_ids=tuple(tuple(encoded[i]) for i in kept),
        categories=tuple(prompts[i].category for i in kept),
        num_too_long=len(encoded) - len(kept),
        stop_token_ids=_stop_token_ids(model, tokenizer),
    )


def _encode(tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    messages: Sequence[Mapping[str, Any]] | None = prompt.messages
    if messages is None and chat:
        messages = [{"role": "user", "content": prompt.text}]
    if messages is None:
        return list(tokenizer(prompt.text, verbose=False)["input_ids"])
    try:
        return chat_token_ids(tokenizer, messages, prompt.tools)
    except ValueError as error:
        raise UserError(f"{OPTION} {prompt.where}: {error}") from None


def _stop_token_ids(model: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end answers by the generation config or the tokenizer."""
    ids = {*stop_token_ids(model, None), tokenizer.eos_token_id}
    return tuple(sorted(ids - {None}))
