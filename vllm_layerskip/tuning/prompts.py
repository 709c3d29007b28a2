# SPDX-License-Identifier: Apache-2.0
"""Prompts from a file: Spec-Bench's questions, JSON lines, or one prompt a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_layerskip.errors import UserError

TEXT_KEYS = ("prompt", "text")
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and its category if the file names one."""

    text: str
    category: str | None = None


def read_prompts(path: Path, option: str = "--prompts") -> list[Prompt]:
    """The prompts of a file.

    Of a ``.jsonl`` file each line is a string, an object with ``prompt`` or ``text``, or one with
    ``turns`` as Spec-Bench has it (``question_id``, ``category``, ``turns``), of which the first
    turn counts. Of any other file each line is a prompt.

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
        record = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: this is no JSON ({error}). Each line must be a JSON string or object; call "
            "a file of plain lines .txt."
        ) from None
    if isinstance(record, str) and record.strip():
        return Prompt(record)
    if isinstance(record, dict):
        turns = record.get("turns")
        texts = [turns[0] if isinstance(turns, list) and turns else None]
        texts += [record.get(key) for key in TEXT_KEYS]
        category = record.get("category")
        for text in texts:
            if isinstance(text, str) and text.strip():
                return Prompt(text, category if isinstance(category, str) else None)
    raise UserError(
        f"{where}: there is no prompt. Each line must be a JSON string, or an object with the text "
        "in 'prompt' or 'text', or in 'turns' as Spec-Bench has it."
    )


def spread(prompts: Sequence[Prompt], num_prompts: int) -> list[Prompt]:
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
    """What ends the model's answers."""


def encode_prompts(
    prompts: Sequence[Prompt], model: str, max_prompt_tokens: int, chat: bool
) -> EncodedPrompts:
    """Token ids as the model's server would make them.

    Args:
        chat: the prompts are a user's messages, wrapped by the tokenizer's chat template.

    Raises:
        UserError: the model has no tokenizer or chat template, or every prompt is too long.
    """
    tokenizer, stop_token_ids = _load_tokenizer(model)
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
        stop_token_ids=stop_token_ids,
    )


def _encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if chat:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # A chat template writes its own special tokens.
    return list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])


def _load_tokenizer(model: str) -> tuple[Any, tuple[int, ...]]:
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {model}: its tokenizer could not be read ({reason}). Give a folder with the "
            "tokenizer's files, or a name on the model hub."
        ) from None
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    ids = set(ends) if isinstance(ends, list) else {ends}
    ids.add(tokenizer.eos_token_id)
    return tokenizer, tuple(sorted(token for token in ids if token is not None))
