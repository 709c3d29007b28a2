# SPDX-License-Identifier: Apache-2.0
"""What every exit would say along given texts: one teacher-forced pass of transformers.

Hidden states are read by hooks and go through the head at once, a chunk at a time, so memory
holds one layer's states and one chunk of logits, whatever the number of exits.

Shapes: B texts, T tokens, M tokens to predict, X exits, H hidden, D head rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from vllm_layerskip.evaluation.agreement import Agreement, matches_of
from vllm_layerskip.evaluation.exits import exit_logits

HEAD_CHUNK_TOKENS = 512
"""Tokens whose logits exist at one time."""

TokenIds = Sequence[Sequence[int]]


def measure_agreement(
    model: nn.Module,
    prompts: TokenIds,
    continuations: TokenIds,
    exit_layers: Sequence[int],
    draft_vocab: Sequence[int] | None = None,
    max_batch_tokens: int = 4096,
) -> Agreement:
    """Compare every exit with the greedy ``continuations`` of ``prompts``.

    Args:
        exit_layers: E of each exit, ``1 <= E < L``.
        draft_vocab: token ids that drafts may be; all if None.
        max_batch_tokens: padded tokens of one forward; a longer text goes alone.
    """
    num_layers = len(model.model.layers)
    order = [i for i in range(len(prompts)) if len(continuations[i]) > 1]
    order.sort(key=lambda i: len(prompts[i]) + len(continuations[i]))
    matches: dict[int, Any] = {}
    num_same = num_compared = 0
    for batch in _batches(order, prompts, continuations, max_batch_tokens):
        texts = [([*prompts[i]], [*continuations[i]]) for i in batch]
        predicted = _predict(model, texts, [*exit_layers, num_layers], draft_vocab)
        for index, rows in zip(batch, predicted, strict=True):
            target = np.asarray(continuations[index])
            num_same += int((rows[-1] == target).sum())
            num_compared += len(target)
            matches[index] = matches_of(rows[:-1], continuations[index])
    return Agreement(
        exit_layers=tuple(exit_layers),
        matches=tuple(matches[i] for i in sorted(matches)),
        target_agreement=num_same / max(num_compared, 1),
    )


def _batches(
    order: Sequence[int], prompts: TokenIds, continuations: TokenIds, max_batch_tokens: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:  # Ascending lengths: the newest is the longest.
        length = len(prompts[index]) + len(continuations[index])
        if batch and length * (len(batch) + 1) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def _predict(
    model: nn.Module,
    texts: Sequence[tuple[list[int], list[int]]],
    exit_layers: Sequence[int],
    draft_vocab: Sequence[int] | None,
) -> list[np.ndarray]:
    """``[X, N]`` argmax of every exit for each text's continuation.

    The last of ``exit_layers`` is the whole model, which no draft vocabulary binds.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    predicts = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        ids = (prompt + answer)[:-1]
        # Padding stands behind a text, where causal attention does not see it.
        input_ids[row, : len(ids)] = torch.tensor(ids)
        predicts[row, len(prompt) - 1 : len(ids)] = True
    device = next(model.parameters()).device
    predicts = predicts.to(device)
    rows = None if draft_vocab is None else torch.tensor(sorted(draft_vocab), device=device)
    argmax = torch.zeros(len(exit_layers), int(predicts.sum()), dtype=torch.long)

    def observe(exit_index: int, state: torch.Tensor) -> None:
        whole = exit_index == len(exit_layers) - 1
        argmax[exit_index] = _argmax(model, state[predicts], None if whole else rows).cpu()

    with _observing(model, exit_layers, observe):
        model.model(input_ids=input_ids.to(device), use_cache=False)
    lengths = [len(answer) for _, answer in texts]
    return [part.numpy() for part in argmax.split(lengths, dim=1)]


def _argmax(model: nn.Module, state: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """``[M, H] -> [M]`` token ids, of ``rows`` only if given."""
    parts = []
    for chunk in state.split(HEAD_CHUNK_TOKENS):
        logits = exit_logits(model, chunk)
        parts.append(logits.argmax(-1) if rows is None else rows[logits[:, rows].argmax(-1)])
    return torch.cat(parts)


@contextmanager
def _observing(
    model: nn.Module, exit_layers: Sequence[int], observe: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``observe(index, state [B, T, H])`` with what leaves each exit layer."""

    def hook(index: int) -> Callable[..., None]:
        def read(_module: nn.Module, _args: Any, output: Any) -> None:
            observe(index, output[0] if isinstance(output, tuple) else output)

        return read

    layers = model.model.layers
    handles = [layers[e - 1].register_forward_hook(hook(i)) for i, e in enumerate(exit_layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def generate_greedily(
    model: nn.Module,
    prompts: TokenIds,
    max_tokens: int,
    stop_token_ids: Sequence[int],
    batch_size: int = 16,
) -> list[list[int]]:
    """Greedy continuations of prompts of any length; each ends with its first stop token."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generation = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        # In place of None transformers would put the model's own.
        eos_token_id=list(stop_token_ids) or [model.config.vocab_size],
        pad_token_id=0,
    )
    device = next(model.parameters()).device
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        length = max(len(prompts[i]) for i in batch)
        input_ids = torch.zeros(len(batch), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(batch):
            ids = torch.tensor(prompts[index])
            input_ids[row, length - len(ids) :] = ids
            attention_mask[row, length - len(ids) :] = 1
        output = model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=generation,
        )
        for index, row in zip(batch, output[:, length:].tolist(), strict=True):
            answers[index] = _until_stop(row, stop_token_ids)
    return [answers[i] for i in range(len(prompts))]


def _until_stop(token_ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for position, token in enumerate(token_ids):
        if token in stop_token_ids:
            return token_ids[: position + 1]
    return token_ids
