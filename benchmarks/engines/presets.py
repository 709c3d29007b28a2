# SPDX-License-Identifier: Apache-2.0
"""Settings with published acceptance, and what acceptance means for another K.

The paper states acceptance as accepted drafts per drafted token, so its acceptance length
(tokens per verification) is ``1 + K * rate``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_layerskip.errors import UserError


@dataclass(frozen=True)
class Preset:
    """One setting of a shape: E, K and the acceptance length at that K."""

    shape: str
    exit_layer: int
    num_speculative_tokens: int
    acceptance_length: float
    source: str
    draft_vocab: int | None = None


def _table_3(shape: str, exit_layer: int, num_drafts: int, rate: float, task: str) -> Preset:
    source = f"arXiv 2404.16710v4, table 3, {task}: {rate:.1%} of the drafts accepted"
    return Preset(shape, exit_layer, num_drafts, round(1 + num_drafts * rate, 2), source)


PRESETS: dict[str, Preset] = {
    "7b-cnndm": _table_3("llama-2-7b", 8, 12, 0.689, "CNN/DM"),
    "7b-xsum": _table_3("llama-2-7b", 8, 12, 0.546, "XSUM"),
    "7b-humaneval": _table_3("llama-2-7b", 8, 6, 0.671, "HumanEval"),
    "13b-cnndm": _table_3("llama-2-13b", 15, 12, 0.745, "CNN/DM"),
    "8b": Preset("llama-3-8b", 4, 4, 3.0, "assumed: no acceptance is published for this model"),
    "8b-vocab32k": Preset(
        "llama-3-8b", 4, 4, 3.0, "assumed: no acceptance is published for this model", 32000
    ),
    "1b": Preset("llama-3.2-1b", 4, 4, 3.0, "assumed: no acceptance is published for this model"),
    "tiny": Preset("tiny", 2, 4, 3.0, "none: a rehearsal"),
}


def expected_length(probability: float, num_drafts: int) -> float:
    """Acceptance length if a draft after accepted ones is always accepted with ``probability``."""
    return 1 + sum(probability**position for position in range(1, num_drafts + 1))


def acceptance_probability(length: float, num_drafts: int) -> float:
    """The per-draft probability that gives ``length`` at K = ``num_drafts``; inverse of
    ``expected_length``.

    Raises:
        UserError: no probability gives that length.
    """
    if not 1 <= length <= num_drafts + 1:
        raise UserError(
            f"synthetic_acceptance_length={length} must be from 1 to {num_drafts + 1} for "
            f"{num_drafts} speculative tokens. Change either."
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # Halvings: below the spacing of floats.
        middle = (low + high) / 2
        if expected_length(middle, num_drafts) < length:
            low = middle
        else:
            high = middle
    return high


def length_for(length: float, num_drafts: int, other_num_drafts: int) -> float:
    """The acceptance length at another K, if the per-draft probability stays."""
    if num_drafts == other_num_drafts:
        return length
    probability = acceptance_probability(length, num_drafts)
    return round(expected_length(probability, other_num_drafts), 3)


def geometric_rates(length: float, num_drafts: int) -> list[float]:
    """Unconditional acceptance rate of each position (``synthetic_acceptance_rates``).

    For a schedule of K: under vLLM's ``synthetic_acceptance_length`` the first positions would
    always be accepted, and a smaller K would look better than it is.
    """
    probability = acceptance_probability(length, num_drafts)
    return [round(probability**position, 6) for position in range(1, num_drafts + 1)]
