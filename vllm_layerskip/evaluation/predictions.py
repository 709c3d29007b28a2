# SPDX-License-Identifier: Apache-2.0
"""Greedy text of a transformers model, and what every exit would say along it.

One teacher-forced pass tells the predictions of all exits. Memory holds one layer's states and
one chunk of logits, whatever the number of exits.

Shapes: B texts, T tokens, M tokens to predict, N of them in one text, X exits, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from vllm_layerskip.evaluation.agreement import Agreement, matches_of
from vllm_layerskip.evaluation.exits import exit_logits_by_chunk, observe_exit_states

TokenIds = Sequence[Sequence[int]]
Text = tuple[list[int], list[int]]
"""Token ids of a prompt and of its continuation."""


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
    matches: dict[int, np.ndarray] = {}
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
    texts: Sequence[Text],
    exit_layers: Sequence[int],
    draft_vocab: Sequence[int] | None,
) -> list[np.ndarray]:
    """``[X, N]`` argmax of every exit for each text's continuation.

    The last of ``exit_layers`` is the whole model, to which no draft vocabulary applies.
    """
    device = next(model.parameters()).device
    input_ids, predicts = (tensor.to(device) for tensor in _padded(texts))
    rows = None if draft_vocab is None else torch.tensor(sorted(draft_vocab), device=device)
    argmax = torch.zeros(len(exit_layers), int(predicts.sum()), dtype=torch.long)
    exits_at = {exit_layer - 1: index for index, exit_layer in enumerate(exit_layers)}

    def observe(layer: int, state: torch.Tensor) -> None:
        index = exits_at.get(layer)
        if index is not None:
            is_whole = index == len(exit_layers) - 1
            argmax[index] = _argmax(model, state[predicts], None if is_whole else rows).cpu()

    with observe_exit_states(model, observe):
        model.model(input_ids=input_ids, use_cache=False)
    lengths = [len(answer) for _, answer in texts]
    return [part.numpy() for part in argmax.split(lengths, dim=1)]


def _padded(texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, T]`` token ids, and booleans: the positions that predict a continuation's token.

    The last token of a text predicts none and is left out. Padding follows the text, where
    causal attention does not see it.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    predicts = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        ids = (prompt + answer)[:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        predicts[row, len(prompt) - 1 : len(ids)] = True
    return input_ids, predicts


def _argmax(model: nn.Module, state: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """``[M, H] -> [M]`` token ids, of ``rows`` only if given."""
    return torch.cat(
        [
            logits.argmax(-1) if rows is None else rows[logits[:, rows].argmax(-1)]
            for logits in exit_logits_by_chunk(model, state)
        ]
    )


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
        # Not None, which transformers replaces by the model's own: a token that no model says.
        eos_token_id=list(stop_token_ids) or [model.config.vocab_size],
        pad_token_id=0,
    )
    device = next(model.parameters()).device
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        input_ids, attention_mask = _left_padded([prompts[i] for i in batch])
        output = model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=generation,
        )
        new_tokens = output[:, input_ids.shape[1] :].tolist()
        for index, row in zip(batch, new_tokens, strict=True):
            answers[index] = _until_stop(row, stop_token_ids)
    return [answers[i] for i in range(len(prompts))]


def _left_padded(prompts: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, T]`` token ids and attention mask."""
    length = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    return input_ids, attention_mask


def _until_stop(token_ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for position, token in enumerate(token_ids):
        if token in stop_token_ids:
            return token_ids[: position + 1]
    return token_ids
