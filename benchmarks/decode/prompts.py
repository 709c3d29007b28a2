# SPDX-License-Identifier: Apache-2.0
"""The prompts: every mode gets the same token ids.

* ``random``: uniform token ids, for dummy weights;
* ``python``: windows of the standard library's modules that training holds out;
* a file of questions (``benchmarks/engines/questions.py``): their first turns.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines.questions import read_questions
from vllm_layerskip.errors import UserError
from vllm_layerskip.files.corpus import load_stdlib
from vllm_layerskip.files.tokenizers import load_tokenizer

SEED = 0


def make_prompts(
    source: str, num_prompts: int, prompt_len: int, vocab_size: int, model: Path
) -> list[list[int]]:
    """``num_prompts`` prompts of ``prompt_len`` token ids each.

    Args:
        source: ``random``, ``python`` or a file.
        model: the checkpoint whose tokenizer reads the texts.

    Raises:
        UserError: the file cannot be read, or the texts are too short.
    """
    if source == "random":
        return _random_prompts(num_prompts, prompt_len, vocab_size)
    tokenizer = load_tokenizer(str(model), "--model")
    texts = _held_out_texts() if source == "python" else _first_turns(Path(source))
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if source == "python":
        return _windows([i for ids in encoded for i in ids], bos, num_prompts, prompt_len)
    prompts = [[*bos, *ids][:prompt_len] for ids in encoded]
    prompts = [ids for ids in prompts if len(ids) == prompt_len][:num_prompts]
    if len(prompts) < num_prompts:
        raise UserError(
            f"--prompts={source} has {len(prompts)} texts of {prompt_len} tokens; {num_prompts} "
            "are needed. Lower --batch-sizes or --prompt-lens."
        )
    return prompts


def _first_turns(path: Path) -> list[str]:
    return [question.turns[0] for question in read_questions(path)]


def _random_prompts(num_prompts: int, prompt_len: int, vocab_size: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    # From 3 on: the ids below are special tokens, such as the end of a sequence.
    return torch.randint(3, vocab_size, (num_prompts, prompt_len), generator=generator).tolist()


def _held_out_texts() -> list[str]:
    return [text for _, text in sorted(load_stdlib().held_out.items())]


def _windows(
    stream: list[int], bos: list[int], num_prompts: int, prompt_len: int
) -> list[list[int]]:
    """Windows that start at equal distances, so that they overlap as little as can be."""
    num_ids = prompt_len - len(bos)
    last = len(stream) - num_ids
    if last < num_prompts:
        raise UserError(
            f"The held-out text has {len(stream)} tokens, too few for {num_prompts} prompts of "
            f"{prompt_len}. Lower --batch-sizes or --prompt-lens."
        )
    starts = [index * last // num_prompts for index in range(num_prompts)]
    return [[*bos, *stream[start : start + num_ids]] for start in starts]
