# SPDX-License-Identifier: Apache-2.0
"""``read_counters`` under its public name."""

from vllm_layerskip.metrics.counters import SpecDecodeCounters, read_counters

__all__ = ["SpecDecodeCounters", "read_counters"]
