# SPDX-License-Identifier: Apache-2.0
"""What the exits of a twin, its last layer's among them, would say along the target's answers.

An engine's drafts attend to the target's K/V but for those of their own step. Here they attend to
the twin's at every position, so an engine accepts as many drafts or more.

Shapes: N generated tokens of a prompt, X exits, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vllm_layerskip.evaluation.agreement import matches_of
from vllm_layerskip.evaluation.exits import exit_logits_by_chunk, observe_exit_states

TokenIds = Sequence[int]


def measure_twin_agreement(
    twin: nn.Module,
    prompts: Sequence[TokenIds],
    continuations: Sequence[TokenIds],
    exit_layers: Sequence[int],
    draft_vocab: TokenIds | None = None,
) -> tuple[npt.NDArray[np.bool_], ...]:
    """Matches ``[X, N - 1]`` of each prompt with a continuation of two tokens or more.

    Args:
        exit_layers: E of each exit, ``1 <= E <= L``.
        draft_vocab: token ids that drafts may be; all if None.
    """
    device = next(twin.parameters()).device
    rows = None if draft_vocab is None else torch.tensor(sorted(draft_vocab), device=device)
    return tuple(
        matches_of(_predict(twin, prompt, continuation, exit_layers, rows), continuation)
        for prompt, continuation in zip(prompts, continuations, strict=True)
        if len(continuation) > 1
    )


@torch.inference_mode()
def _predict(
    twin: nn.Module,
    prompt: TokenIds,
    continuation: TokenIds,
    exit_layers: Sequence[int],
    rows: torch.Tensor | None,
) -> npt.NDArray[np.int64]:
    """``[X, N]`` argmax of every exit for the continuation."""
    # The last token predicts none.
    input_ids = torch.tensor([[*prompt, *continuation]])[:, :-1]
    predictions = np.zeros((len(exit_layers), len(continuation)), np.int64)
    index_of = {exit_layer - 1: index for index, exit_layer in enumerate(exit_layers)}

    def observe(layer: int, state: torch.Tensor) -> None:  # [1, T, H]
        if layer not in index_of:
            return
        chunks = exit_logits_by_chunk(twin, state[0, len(prompt) - 1 :])
        argmax = [
            logits.argmax(-1) if rows is None else rows[logits[:, rows].argmax(-1)]
            for logits in chunks
        ]
        predictions[index_of[layer]] = torch.cat(argmax).cpu().numpy()

    with observe_exit_states(twin, observe):
        twin.model(input_ids=input_ids.to(next(twin.parameters()).device), use_cache=False)
    return predictions
