# SPDX-License-Identifier: Apache-2.0
"""A worker extension that kills its worker in the middle of a draft pass."""

from __future__ import annotations

import os
import signal
from typing import Any

from counting_worker import CountingWorkerExtension

DIES_IN_PASS = 12


class DyingWorkerExtension(CountingWorkerExtension):
    rank: int

    def die_in_draft(self, rank: int) -> None:
        """Have the worker of ``rank`` end by SIGKILL within its 12th draft pass from now."""
        if self.rank != rank:
            return
        speculator = self.model_runner.speculator
        run_early_stage = speculator.model.run_early_stage
        in_draft = speculator._draft_pass
        passes = 0

        def draft_pass(*args: Any, **kwargs: Any) -> None:
            nonlocal passes
            passes += 1
            if passes == DIES_IN_PASS:
                speculator.model.run_early_stage = die_after_stage
            in_draft(*args, **kwargs)

        def die_after_stage(*args: Any, **kwargs: Any) -> Any:
            run_early_stage(*args, **kwargs)  # Its K/V is written.
            os.kill(os.getpid(), signal.SIGKILL)

        speculator._draft_pass = draft_pass
