# SPDX-License-Identifier: Apache-2.0
"""What the processes of ``benchmarks.prompts.real_prompts`` get to do: a job for each."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.engines.questions import (
    Question,
    choose_evenly,
    read_questions,
    require_different_ids,
)
from benchmarks.engines.settings import Settings, read_config
from benchmarks.prompts.chats import Chats
from benchmarks.prompts.drafts import Drafts, all_drafts, drafts_of_checkpoint
from benchmarks.prompts.measure import Sampling
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.tokenizers import load_tokenizer
from vllm_layerskip.twins.kinds import NONE


@dataclass(frozen=True)
class Run:
    """What a process measures: a mode with E and K, and LayerSkip's drafts if they are named."""

    mode: str
    pair: tuple[int, int]
    drafts: Drafts | None = None


def jobs(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """One for each process, and why a mode has none for some drafts.

    Raises:
        UserError: an option or a file is wrong; the message names it.
    """
    config = read_config(args.model)
    runs, left_out = _runs(args, config)
    longest = max(run.pair[1] for run in runs)
    max_prompt_tokens = _max_prompt_tokens(args, config, longest)
    chosen, source = _questions(args, max_prompt_tokens)
    sampling = Sampling(
        args.max_tokens, args.temperature, args.seed, args.ignore_eos, args.chat, max_prompt_tokens
    )
    return [
        {
            "mode": run.mode,
            "settings": asdict(_settings(args, run, max_prompt_tokens + longest - run.pair[1])),
            "drafts": None if run.drafts is None else run.drafts.facts(),
            "sampling": asdict(sampling),
            "questions": [asdict(question) for question in chosen],
            "source": source,
        }
        for run in runs
    ], left_out


def _runs(args: argparse.Namespace, config: dict[str, Any]) -> tuple[list[Run], list[str]]:
    """The modes with the drafts that were named: pairs (E, K), or drafts as data."""
    if args.pairs is not None and args.drafts is not None:
        raise UserError("--pairs cannot go with --drafts. Give one of them.")
    if args.pairs is not None:
        _check_pairs(args.pairs, config["num_hidden_layers"])
        return [Run(mode, pair) for mode, pair in modes_with_pairs(args.modes, args.pairs)], []
    if args.draft_vocab is not None:
        raise UserError(
            f"--draft-vocab {args.draft_vocab} goes with --pairs. Give draft_vocab in --drafts."
        )
    model = Path(args.model)
    drafts = (
        [drafts_of_checkpoint(model, config)]
        if args.drafts is None
        else all_drafts(args.drafts, model, config)
    )
    return modes_with_drafts(args.modes, drafts)


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
    all_questions = read_questions(args.questions, chat=args.chat)
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


def modes_with_drafts(
    modes: Sequence[str], drafts: Sequence[Drafts]
) -> tuple[list[Run], list[str]]:
    """A run for each process, and why a mode has none for some drafts.

    ``draft-model`` runs once for each (E, K) of the drafts, ``ngram`` for each K.
    """
    runs: list[Run] = []
    left_out = []
    for mode in dict.fromkeys(modes):
        for of_mode in drafts:
            found = _run(mode, of_mode)
            if isinstance(found, str):
                left_out.append(f"{mode}: none for {of_mode.name}, {found}.")
            elif found not in runs:
                runs.append(found)
    return runs, left_out


def _run(mode: str, drafts: Drafts) -> Run | str:
    """The run of a mode, or why there is none."""
    if mode == "plain":
        return Run(mode, (0, 0))
    if mode == "ngram":
        return Run(mode, (0, drafts.num_speculative_tokens))
    if mode == "draft-model":
        if drafts.has_all_layers:
            return "whose drafts have all layers: a model of them would be the target itself"
        return Run(mode, drafts.pair)
    if mode == "layerskip-no-reuse":
        if not drafts.reuses:
            return "which reuses no exit states anyhow"
        config = drafts.config | {"reuse_exit_states": False}
        return Run(mode, drafts.pair, replace(drafts, config=config, reuses=False))
    return Run(mode, drafts.pair, drafts)


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


def _settings(args: argparse.Namespace, run: Run, max_prompt_tokens: int) -> Settings:
    return Settings(
        model=args.model,
        exit_layer=run.pair[0],
        num_speculative_tokens=run.pair[1],
        draft_vocab=args.draft_vocab,
        draft_quantization=NONE if run.drafts is None else run.drafts.draft_quantization,
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
