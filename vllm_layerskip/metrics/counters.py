# SPDX-License-Identifier: Apache-2.0
"""What an engine drafted, accepted and reused so far, read through vLLM's public API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_layerskip.metrics.prometheus import PREFIX

if TYPE_CHECKING:
    from vllm import LLM

_PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class SpecDecodeCounters:
    """Counts since the engine started; subtract two for the counts between them."""

    num_drafts: int
    """Verifications of one request; each yields its accepted tokens and one more."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]
    num_verify_steps_reused: int
    num_verify_steps_full: int

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification: 1 + accepted / drafts."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """Share of verifications that accepted the draft at each position."""
        drafts = max(self.num_drafts, 1)
        return tuple(count / drafts for count in self.num_accepted_tokens_per_pos)

    def __sub__(self, earlier: SpecDecodeCounters) -> SpecDecodeCounters:
        return SpecDecodeCounters(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            tuple(
                after - before
                for after, before in zip(
                    self.num_accepted_tokens_per_pos,
                    earlier.num_accepted_tokens_per_pos,
                    strict=True,
                )
            ),
            self.num_verify_steps_reused - earlier.num_verify_steps_reused,
            self.num_verify_steps_full - earlier.num_verify_steps_full,
        )


def read_counters(llm: LLM) -> SpecDecodeCounters:
    """The counts of a LayerSkip engine that was started with ``disable_log_stats=False``.

    vLLM's counters belong to the process: of several engines in one process, the newest
    is read.

    Raises:
        ValueError: the engine keeps no statistics, or does not run LayerSkip.
    """
    try:
        metrics: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    except AssertionError:  # vLLM's, without statistics.
        metrics = {}
    if not {f"{_PREFIX}drafts", f"{PREFIX}num_verify_steps_full"} <= metrics.keys():
        raise ValueError(
            "This engine has no counters of LayerSkip. Start it with speculative_config="
            "{'method': 'layerskip', ...} and disable_log_stats=False."
        )
    return SpecDecodeCounters(
        num_drafts=int(metrics[f"{_PREFIX}drafts"].value),
        num_draft_tokens=int(metrics[f"{_PREFIX}draft_tokens"].value),
        num_accepted_tokens=int(metrics[f"{_PREFIX}accepted_tokens"].value),
        num_accepted_tokens_per_pos=tuple(
            int(count) for count in metrics[f"{_PREFIX}accepted_tokens_per_pos"].values
        ),
        num_verify_steps_reused=int(metrics[f"{PREFIX}num_verify_steps_reused"].value),
        num_verify_steps_full=int(metrics[f"{PREFIX}num_verify_steps_full"].value),
    )
