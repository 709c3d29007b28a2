# SPDX-License-Identifier: Apache-2.0
"""Self-speculation spelled out: slow, and without a line of the package's shortcuts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch


def accepted_runs(row: Sequence[bool], num_speculative_tokens: int) -> list[int]:
    """Accepted drafts of each whole verification step along one row of matches."""
    runs, position = [], 0
    while position + num_speculative_tokens < len(row):
        window = row[position : position + num_speculative_tokens]
        num_accepted = next((i for i, match in enumerate(window) if not match), len(window))
        runs.append(num_accepted)
        position += num_accepted + 1
    return runs


def cut(model: Any, num_layers: int) -> Any:
    """A model of the first layers, with the same norm and head."""
    first = copy.deepcopy(model)
    first.model.layers = first.model.layers[:num_layers]
    return first


@torch.no_grad()
def next_tokens(model: Any, ids: list[int]) -> list[int]:
    """The model's greedy choice after every prefix of ``ids``."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()


def continuation(model: Any, prompt: list[int], num_new_tokens: int) -> list[int]:
    """The greedy continuation, one token at a time."""
    ids = list(prompt)
    for _ in range(num_new_tokens):
        ids.append(next_tokens(model, ids)[-1])
    return ids[len(prompt) :]


def matches(model: Any, exit_layer: int, prompt: list[int], target: list[int]) -> list[bool]:
    """Where the model cut after ``exit_layer`` says the target's token, from its second one on."""
    choices = next_tokens(cut(model, exit_layer), prompt + target[:-1])[len(prompt) :]
    return [a == b for a, b in zip(choices, target[1:], strict=True)]


def draft_and_verify(
    model: Any, draft: Any, prompt: list[int], num_drafts: int, num_new_tokens: int
) -> tuple[list[int], list[int]]:
    """Self-speculation as an engine does it: ``(accepted per step, continuation)``."""
    ids = [*prompt, next_tokens(model, prompt)[-1]]
    accepted = []
    while len(ids) - len(prompt) + num_drafts + 1 <= num_new_tokens:
        drafts: list[int] = []
        for _ in range(num_drafts):
            drafts.append(next_tokens(draft, ids + drafts)[-1])
        verified = next_tokens(model, ids + drafts)[len(ids) - 1 :]
        num_accepted = 0
        while num_accepted < num_drafts and drafts[num_accepted] == verified[num_accepted]:
            num_accepted += 1
        ids += verified[: num_accepted + 1]
        accepted.append(num_accepted)
    return accepted, ids[len(prompt) :]
