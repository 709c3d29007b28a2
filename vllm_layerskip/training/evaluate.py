# SPDX-License-Identifier: Apache-2.0
"""Scores of a LayerSkip checkpoint without an engine: what each exit knows.

Drafts that count are those behind an accepted prefix, and an accepted prefix is the
target's own text. So one forward pass over the target's greedy continuation tells every
draft decision of every exit layer: no draft loop, no cache, and a reference for the
engine that shares no code with it.

Shapes: B samples, T tokens, N continuation tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from vllm_layerskip.training.exits import exit_logits, record_exit_states


@dataclass(frozen=True)
class ExitScore:
    """Next-token scores of the exit after ``exit_layer`` layers."""

    exit_layer: int
    accuracy: float
    perplexity: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.inference_mode()
def score_exits(model: nn.Module, windows: torch.Tensor, batch_size: int = 16) -> list[ExitScore]:
    """Accuracy and perplexity of every exit on ``windows [B, T]`` of token ids."""
    num_layers = model.config.num_hidden_layers
    correct, nll, count = [0] * num_layers, [0.0] * num_layers, 0
    for batch in windows.to(model.device).split(batch_size):
        with record_exit_states(model) as states:
            model.model(input_ids=batch, use_cache=False)
        labels = batch[:, 1:].flatten()
        count += labels.numel()
        for layer, state in enumerate(states):
            logits = exit_logits(model, state[:, :-1]).flatten(0, 1).float()
            correct[layer] += int((logits.argmax(-1) == labels).sum())
            nll[layer] += float(F.cross_entropy(logits, labels, reduction="sum"))
    return [
        ExitScore(layer + 1, correct[layer] / count, math.exp(nll[layer] / count))
        for layer in range(num_layers)
    ]


@torch.inference_mode()
def greedy_draft_matches(
    model: nn.Module, prompts: torch.Tensor, num_new_tokens: int
) -> torch.Tensor:
    """Where each exit would draft the token that the target says.

    Args:
        prompts: ``[B, T]`` token ids, all of one length.

    Returns:
        ``[L - 1, B, N]`` booleans: exit ``E = i + 1`` against the greedy continuation
        (which does not stop at the end-of-sequence token).
    """
    prompts = prompts.to(model.device)
    # No end-of-sequence token: `min_new_tokens` would bar it from being chosen instead.
    generation = GenerationConfig(
        max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    sequences = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=generation
    )
    with record_exit_states(model) as states:
        model.model(input_ids=sequences[:, :-1], use_cache=False)
    first = prompts.shape[1] - 1
    target = sequences[:, first + 1 :]
    return torch.stack(
        [exit_logits(model, state[:, first:]).argmax(-1) == target for state in states[:-1]]
    )


def acceptance_length(matches: torch.Tensor, num_speculative_tokens: int) -> float:
    """Mean tokens per verification (1 + accepted / drafts) over rows ``[B, N]`` of matches.

    The first continuation token comes from the prefill, so walking starts after it.

    Raises:
        ValueError: the rows are too short for one whole step.
    """
    if matches.shape[1] <= num_speculative_tokens + 1:
        raise ValueError(
            f"{matches.shape[1]} continuation tokens are too few for one step of "
            f"{num_speculative_tokens} drafts. Continue the prompts for longer."
        )
    num_steps = num_tokens = 0
    for row in matches.tolist():
        for num_accepted in accepted_runs(row[1:], num_speculative_tokens):
            num_steps += 1
            num_tokens += num_accepted + 1
    return num_tokens / num_steps


def accepted_runs(row: Sequence[bool], num_speculative_tokens: int) -> list[int]:
    """Accepted drafts of each whole verification step along one continuation."""
    runs, position = [], 0
    while position + num_speculative_tokens < len(row):
        window = row[position : position + num_speculative_tokens]
        num_accepted = next((i for i, match in enumerate(window) if not match), len(window))
        runs.append(num_accepted)
        position += num_accepted + 1
    return runs
