# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, with a resource that Ray can place workers on.

vLLM's Ray executors ask the platform for the Ray resource of its devices, and the CPU platform
names none: they refuse it. This folder on PYTHONPATH is a distribution with a platform plugin,
as an out-of-tree platform would be: Ray's logical GPUs stand for places on the CPU
(``ray.init(num_gpus=2)`` needs no GPU). Everything else is vLLM's CPU platform.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"


def register() -> str:
    """Entry point ``vllm.platform_plugins``."""
    return "ray_cpu_platform.RayCpuPlatform"
