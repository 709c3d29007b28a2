# SPDX-License-Identifier: Apache-2.0
"""Lets an engine be asked about its workers (``LLM.collective_rpc("layerskip_stats")``)."""

from __future__ import annotations

from typing import Any


class LayerSkipWorkerExtension:
    """Mixed into vLLM's worker class through ``worker_extension_cls``."""

    model_runner: Any

    def layerskip_stats(self) -> dict[str, int]:
        """This worker's ``VerifyStats`` as a dictionary."""
        return self.model_runner.model_state.stats.to_dict()
