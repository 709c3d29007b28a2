# SPDX-License-Identifier: Apache-2.0
"""Carries the workers' verify counts and memory to the process that answers ``/metrics``.

A worker counts verify steps and knows its memory; the engine's front end, in another process and
maybe on another machine, exports them. The counts ride on messages that vLLM sends anyway, as host
integers, so nothing waits for the device and no message is added:

* worker -> scheduler: the totals so far are an attribute of the step's ``ModelRunnerOutput``.
  vLLM takes the output of one rank per engine, so a count is a step's and not a rank's.
* scheduler -> front end: the increase since the last message follows the K entries of
  ``SpecDecodingStats.num_draft_tokens_per_pos``. That list goes to one front end, and nobody else
  reads it; the front end removes our entries before any logger of vLLM sees the statistics.
  An engine without statistics (``--disable-log-stats``) sends none.

Steps without LayerSkip's attribute pass unchanged. Importing this module imports no vLLM.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm_layerskip.host.contacts import MODEL_RUNNER_MODULE
from vllm_layerskip.host.wrap import wrap

_TOTALS = "layerskip_step_counts"
_HANDED_ON = "_layerskip_step_counts"


class StepCounts(NamedTuple):
    """Verify steps since a worker started, and its memory; a step verifies one batch."""

    num_verify_steps_reused: int = 0
    """Steps that ran the early stage for one token per request."""
    num_verify_steps_full: int = 0
    """Steps that ran the early stage for every token."""
    num_bytes_exit_states: int = 0
    num_bytes_twin_layers: int = 0
    num_bytes_draft_head: int = 0
    """Bytes on one rank that drafting needs beside the model; they do not change."""

    def after_step(self, reused: bool) -> StepCounts:
        """The counts with one step more."""
        return self._replace(
            num_verify_steps_reused=self.num_verify_steps_reused + reused,
            num_verify_steps_full=self.num_verify_steps_full + (not reused),
        )

    def since(self, earlier: StepCounts) -> StepCounts:
        """What is new: increases of counts, and the memory once."""
        if any(now < before for now, before in zip(self, earlier, strict=True)):
            return self  # A worker that was started again counts from 0.
        return StepCounts(*(now - before for now, before in zip(self, earlier, strict=True)))


def send_from_workers() -> None:
    """Have this worker's step outputs carry its counts."""
    runner = sys.modules[MODEL_RUNNER_MODULE]  # Already imported: the runner calls us.
    wrap(runner.GPUModelRunner, "sample_tokens", _sample_tokens)


def wrap_get_scheduler_cls(original: Callable) -> Callable:
    """For ``SchedulerConfig``: the class that it returns hands the counts on."""

    def get_scheduler_cls(self: Any) -> Any:
        scheduler_cls = original(self)
        wrap(scheduler_cls, "update_from_output", _update_from_output)
        return scheduler_cls

    return get_scheduler_cls


def take_step_counts(scheduler_stats: Any, num_speculative_tokens: int) -> StepCounts:
    """Remove from a message's statistics what LayerSkip's scheduler put there."""
    stats = scheduler_stats.spec_decoding_stats
    if stats is None:
        return StepCounts()
    counts = stats.num_draft_tokens_per_pos[num_speculative_tokens:]
    del stats.num_draft_tokens_per_pos[num_speculative_tokens:]
    return StepCounts(*counts)


def _sample_tokens(original: Callable) -> Callable:
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        totals = getattr(self.model_state, "step_counts", None)  # A plain engine has none.
        if output is not None and totals is not None:
            # An asynchronous output holds the one that is sent.
            setattr(getattr(output, "model_runner_output", output), _TOTALS, totals)
        return output

    return sample_tokens


def _update_from_output(original: Callable) -> Callable:
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any
    ) -> Mapping[int, Any]:
        messages = original(self, scheduler_output, model_runner_output)
        totals = getattr(model_runner_output, _TOTALS, None)
        if totals is not None:
            _hand_on(self, totals, messages)
        return messages

    return update_from_output


def _hand_on(scheduler: Any, totals: StepCounts, messages: Mapping[int, Any]) -> None:
    for message in messages.values():
        stats = message.scheduler_stats and message.scheduler_stats.spec_decoding_stats
        # A step without any (all its requests were aborted) leaves its counts to the next one.
        if stats is not None:
            counts = totals.since(getattr(scheduler, _HANDED_ON, StepCounts()))
            stats.num_draft_tokens_per_pos.extend(counts)
            setattr(scheduler, _HANDED_ON, totals)
            return
