# SPDX-License-Identifier: Apache-2.0
"""A worker extension that says what a rank's draft twin is made of."""

from __future__ import annotations

from typing import Any

from counting_worker import CountingWorkerExtension

EXTENSION = "twin_worker.TwinWorkerExtension"


class TwinWorkerExtension(CountingWorkerExtension):
    def step_counts(self) -> dict[str, Any]:
        from twins import outputs, rounding_error

        twin = self.model_runner.model.draft_twin
        return super().step_counts() | {
            "shapes": [list(linear.shape) for linear in twin.linears],
            "errors": [rounding_error(linear, twin.kind) for linear in twin.linears],
            "sums": [float(outputs(linear).double().abs().sum()) for linear in twin.linears],
            "num_exit_state_bytes": twin._model.draft_state.exit_states.num_bytes,
        }
