# SPDX-License-Identifier: Apache-2.0
"""Prompts from a file: Spec-Bench's questions, JSON lines, or one prompt a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError
from vllm_layerskip.files.jsonl import is_text, json_value
from vllm_layerskip.files.tokenizers import load_tokenizer, stop_token_ids

TEXT_KEYS = ("prompt", "text")
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and its category if the file names one."""

    text: str
    category: str | None = None


def read_prompts(path: Path, option: str = "--prompts") -> list[Prompt]:
    """The prompts of a file.

    Each line of a ``.jsonl`` file is a string, an object with ``prompt`` or ``text``, or one with
    ``turns`` as Spec-Bench has it (``question_id``, ``category``, ``turns``), of which the first
    turn counts. Each line of any other file is a prompt.

    Raises:
        UserError: there is no such file, it is no text, or it holds no prompt.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{option} {path}: {error.strerror}. Give a readable file of prompts."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{option} {path}: this is no UTF-8 text. Convert it.") from None
    lines = [(n, line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if path.suffix in _JSON_SUFFIXES:
        prompts = [_json_prompt(line, f"{option} {path}, line {n}") for n, line in lines]
    else:
        prompts = [Prompt(line) for _, line in lines]
    if not prompts:
        raise UserError(f"{option} {path}: there is no prompt in it. Give a file that holds some.")
    return prompts


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        record = json_value(line, where)
    except UserError as error:
        raise UserError(
            f"{error} Each line must be a JSON string or object; call a file of plain lines .txt."
        ) from None
    texts, category = [record], None
    if isinstance(record, dict):
        texts = [_first_turn(record), *(record.get(key) for key in TEXT_KEYS)]
        category = record.get("category")
    for text in filter(is_text, texts):
        return Prompt(text, category if isinstance(category, str) else None)
    raise UserError(
        f"{where}: there is no prompt. Each line must be a JSON string, or an object with the text "
        "in 'prompt' or 'text', or in 'turns' as Spec-Bench has it."
    )


def _first_turn(record: Mapping[str, Any]) -> Any:
    """Later turns do not matter here, so they are not checked (``jsonl.turns_of`` does)."""
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
        chat: the prompts are a user's messages, wrapped by the tokenizer's chat template.

    Raises:
        UserError: the model has no tokenizer or chat template, or every prompt is too long.
    """
    tokenizer = load_tokenizer(model, "--model")
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"--chat: the tokenizer of {model} has no chat template. Leave --chat out, or use an "
            "instruction-tuned checkpoint."
        )
    encoded = [_encode(tokenizer, prompt.text, chat) for prompt in prompts]
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


def _encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if chat:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # A chat template writes its own special tokens.
    return list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])


def _stop_token_ids(model: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end answers by the generation config or the tokenizer."""
    ids = {*stop_token_ids(model, None), tokenizer.eos_token_id}
    return tuple(sorted(ids - {None}))
