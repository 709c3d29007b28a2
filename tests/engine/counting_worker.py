# SPDX-License-Identifier: Apache-2.0
"""A worker extension of a user's own: has workers say what they counted themselves."""

from __future__ import annotations

from typing import Any

EXTENSION = "counting_worker.CountingWorkerExtension"


class CountingWorkerExtension:
    model_runner: Any

    def step_counts(self) -> dict[str, int]:
        return self.model_runner.model_state.step_counts._asdict()
