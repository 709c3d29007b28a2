# SPDX-License-Identifier: Apache-2.0
"""What the processes of ``benchmarks.prompts.real_prompts`` get to do: a job for each."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.engines.questions import (
    Question,
    choose_evenly,
    read_questions,
    require_different_ids,
)
from benchmarks.engines.settings import Settings, read_config
from benchmarks.prompts.chats import Chats
from benchmarks.prompts.measure import Sampling
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.tokenizers import load_tokenizer


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each process.

    Raises:
        UserError: an option or a file is wrong; the message names it.
    """
    config = read_config(args.model)
    pairs = _pairs(args, config)
    longest = max(k for _, k in pairs)
    max_prompt_tokens = _max_prompt_tokens(args, config, longest)
    chosen, source = _questions(args, max_prompt_tokens)
    sampling = Sampling(
        args.max_tokens, args.temperature, args.seed, args.ignore_eos, args.chat, max_prompt_tokens
    )
    return [
        {
            "mode": mode,
            "settings": asdict(_settings(args, pair, max_prompt_tokens + longest - pair[1])),
            "sampling": asdict(sampling),
            "questions": [asdict(question) for question in chosen],
            "source": source,
        }
        for mode, pair in modes_with_pairs(args.modes, pairs)
    ]


def _pairs(args: argparse.Namespace, config: dict[str, Any]) -> list[tuple[int, int]]:
    """The pairs (E, K): given ones, or the checkpoint's."""
    pairs = args.pairs
    if pairs is None:
        block = config.get("layerskip") or {}
        if not {"exit_layer", "num_speculative_tokens"} <= set(block):
            raise UserError(f"--pairs: {args.model} has no layerskip block. Give E:K.")
        pairs = [(block["exit_layer"], block["num_speculative_tokens"])]
    _check_pairs(pairs, config["num_hidden_layers"])
    return pairs


def _max_prompt_tokens(args: argparse.Namespace, config: dict[str, Any], longest: int) -> int:
    """Tokens of a prompt that leave room for its answer and ``longest`` drafts."""
    max_model_len = args.max_model_len or config["max_position_embeddings"]
    max_prompt_tokens = max_model_len - args.max_tokens - longest - 1
    if max_prompt_tokens < 1:
        raise UserError(
            f"--max-tokens {args.max_tokens} leaves no room for a prompt: the model takes "
            f"{max_model_len} tokens. Lower it."
        )
    return max_prompt_tokens


def _questions(
    args: argparse.Namespace, max_prompt_tokens: int
) -> tuple[list[Question], dict[str, Any]]:
    """The questions to ask, and what a record says about their file."""
    all_questions = read_questions(args.questions)
    require_different_ids(all_questions, args.questions)
    fitting = fitting_questions(all_questions, args, max_prompt_tokens)
    if not fitting:
        raise UserError(
            f"--questions {args.questions}: none has a first prompt of at most {max_prompt_tokens} "
            "tokens. Lower --max-tokens, or give shorter questions."
        )
    chosen = choose_evenly(fitting, args.num_questions)
    too_long = Counter(q.category for q in all_questions) - Counter(q.category for q in fitting)
    return chosen, {
        "file": args.questions.name,
        "sha256": hashlib.sha256(args.questions.read_bytes()).hexdigest(),
        "num_questions": len(chosen),
        "of": len(all_questions),
        "too_long": dict(too_long),
    }


def modes_with_pairs(
    modes: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> list[tuple[str, tuple[int, int]]]:
    """A mode with its (E, K) for each process; plain decoding needs no pair, n-gram only K."""
    found: dict[tuple[str, int, int], tuple[str, tuple[int, int]]] = {}
    for mode in modes:
        for exit_layer, num_drafts in pairs:
            e = 0 if mode in ("plain", "ngram") else exit_layer
            k = 0 if mode == "plain" else num_drafts
            found.setdefault((mode, e, k), (mode, (exit_layer, num_drafts)))
    return list(found.values())


def fitting_questions(
    questions: Sequence[Question], args: argparse.Namespace, max_prompt_tokens: int
) -> list[Question]:
    """The questions whose first turn leaves room for the answer.

    Raises:
        UserError: the model has no tokenizer, or no chat template for ``--chat``.
    """
    tokenizer = load_tokenizer(args.model, "--model")
    if args.chat and not tokenizer.chat_template:
        raise UserError(f"--chat: {args.model} has no chat template. Leave --chat out.")
    chats = Chats(tokenizer, args.chat)
    return [
        question
        for question in questions
        if 0 < len(chats.token_ids(question.turns[:1])) <= max_prompt_tokens
    ]


def _check_pairs(pairs: Iterable[tuple[int, int]], num_layers: int) -> None:
    for exit_layer, num_drafts in pairs:
        if not (1 <= exit_layer < num_layers and num_drafts >= 1):
            raise UserError(
                f"--pairs {exit_layer}:{num_drafts}: E must be from 1 to {num_layers - 1}, and K "
                "at least 1. Give E:K, such as 8:6."
            )


def _settings(args: argparse.Namespace, pair: tuple[int, int], max_prompt_tokens: int) -> Settings:
    return Settings(
        model=args.model,
        exit_layer=pair[0],
        num_speculative_tokens=pair[1],
        draft_vocab=args.draft_vocab,
        batch_sizes=[args.batch_size],
        prompt_lens=[max_prompt_tokens],
        output_len=args.max_tokens,
        repeats=args.repeats,
        prompts=args.questions.name,
        dtype=args.dtype,
        device=args.device,
        enforce_eager=args.enforce_eager,
        engine_args=args.engine_args,
    )
