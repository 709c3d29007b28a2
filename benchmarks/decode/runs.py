# SPDX-License-Identifier: Apache-2.0
"""What measuring vLLM and transformers share: the time limit, and the summary of the runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from vllm_layerskip.measuring.timing import Window

Emit = Callable[[dict[str, Any]], None]
"""Takes a record as soon as its cell is measured."""


@dataclass
class Clock:
    """Says whether this process has time for another cell."""

    limit_s: float | None
    longest_s: float = 0.0

    def has_time(self) -> bool:
        """Whether a cell as long as the longest so far still fits."""
        used_s = time.time() - psutil.Process().create_time()
        return self.limit_s is None or used_s + self.longest_s < self.limit_s

    def observe(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)


def summarise(windows: list[Window]) -> dict[str, Any]:
    """Medians over the runs, and every run."""
    return {
        "tokens_per_s": round(statistics.median(w.tokens_per_s for w in windows), 3),
        "step_ms": round(1e3 * statistics.median(w.seconds / w.num_steps for w in windows), 4),
        "runs": [
            asdict(window) | {"tokens_per_s": round(window.tokens_per_s, 3)} for window in windows
        ],
    }
