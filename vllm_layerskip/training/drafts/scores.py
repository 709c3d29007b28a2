# SPDX-License-Identifier: Apache-2.0
"""What an adapter is worth: agreement with the last layer and acceptance, without it and with it.

Scored on text that was not trained on, as it stands: nothing is generated. A draft counts as
accepted if its argmax is that of the last layer after the same text. One pass for each of K places
where draft steps may begin shows every draft with the K/V that it would see in the engine.

Shapes: S samples, T tokens, K drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset  # type: ignore[import-untyped]

from vllm_layerskip.errors import UserError
from vllm_layerskip.training.drafts.loss import DraftLoss
from vllm_layerskip.training.drafts.trainer import DraftTrainer
from vllm_layerskip.training.loss import IGNORED

MAX_SAMPLES = 64
_SHARE = 20
"""One sample in 20 is held out."""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Of drafts on held-out text."""

    agreement: float
    """Share of drafts with the last layer's argmax, over all places in a step."""
    acceptance_length: float
    """Mean tokens of a step: accepted drafts and one more."""

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def hold_out(samples: Dataset, key: str) -> tuple[Dataset, Dataset]:
    """Training samples, and the last few of them to score on.

    Raises:
        UserError: there is one sample alone.
    """
    if len(samples) < 2:
        raise UserError(
            f"{key}: it makes one sample, so none can be held out to score the adapter on. Give "
            "more text, lower data.seq_len, or name texts in data.eval."
        )
    first = len(samples) - min(max(len(samples) // _SHARE, 1), MAX_SAMPLES)
    return samples.select(range(first)), samples.select(range(first, len(samples)))


def score(trainer: DraftTrainer, samples: Dataset) -> dict[str, Any]:
    """Scores without the adapter (``before``) and with it; all ranks must call this."""
    samples = samples.select(range(min(len(samples), MAX_SAMPLES)))
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    num_drafts = trainer.recipe.num_speculative_tokens
    counted: list[Bools] = []
    matches: dict[str, list[Bools]] = {"before": [], "after": []}
    try:
        for batch in _batches(trainer, samples):
            inputs = trainer.run_target(model, batch)
            targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
            counted += list((targets != IGNORED).cpu().numpy())
            with trainer.model.disable_adapter():
                matches["before"] += _matches(trainer, inputs)
            matches["after"] += _matches(trainer, inputs)
    finally:
        model.train(was_training)
        trainer.target.kv.forget()
    found = {name: summarize(rows, counted).to_dict() for name, rows in matches.items()}
    return {
        "num_speculative_tokens": num_drafts,
        "num_samples": len(counted),
        "num_tokens": int(sum(row.sum() for row in counted)),
        **found,
    }


def _batches(trainer: DraftTrainer, samples: Dataset) -> Iterator[dict[str, torch.Tensor]]:
    size = trainer.args.per_device_eval_batch_size
    for start in range(0, len(samples), size):
        rows = [samples[i] for i in range(start, min(start + size, len(samples)))]
        batch = trainer.data_collator(rows)
        yield {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}


def _matches(trainer: DraftTrainer, inputs: dict[str, Any]) -> list[Bools]:
    """``[K, T]`` for each sample: matches where steps begin at ``k + i * K``."""
    num_drafts = trainer.recipe.num_speculative_tokens
    found = []
    for offset in range(num_drafts):
        loss = DraftLoss(trainer.target, trainer.recipe.exit_layer, trainer.recipe.distill)
        with torch.no_grad(), loss.applied(num_drafts, offset):
            trainer.model_wrapped(**inputs)
        found.append(loss.matches.cpu().numpy())
    return list(np.stack(found, axis=1))


def summarize(
    matches: Sequence[Bools],  # S of [K, T]
    counted: Sequence[Bools],  # S of [T]
) -> Scores:
    """Agreement, and the acceptance length of a walk through every run of counted positions.

    A step that would run past the end of its run does not count.
    """
    num_matches = sum(int(rows[:, on].sum()) for rows, on in zip(matches, counted, strict=True))
    num_drafts = sum(len(rows) * int(on.sum()) for rows, on in zip(matches, counted, strict=True))
    num_steps = num_tokens = 0
    for rows, on in zip(matches, counted, strict=True):
        for start, stop in _runs(on):
            steps, tokens = _walk(rows, start, stop)
            num_steps, num_tokens = num_steps + steps, num_tokens + tokens
    return Scores(
        agreement=num_matches / max(num_drafts, 1),
        acceptance_length=num_tokens / num_steps if num_steps else float("nan"),
    )


def _runs(on: Bools) -> list[tuple[int, int]]:
    """Where runs of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _walk(matches: Bools, start: int, stop: int) -> tuple[int, int]:
    """Steps and tokens of drafting from ``start``."""
    num_drafts = len(matches)
    num_steps, position = 0, start
    while position + num_drafts <= stop:
        step = matches[position % num_drafts, position : position + num_drafts]
        position += num_drafts + 1 if step.all() else int(step.argmin()) + 1
        num_steps += 1
    return num_steps, position - start
