# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do at most, by the name that its driver gives it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from vllm_layerskip.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Datasheet peaks: bytes/s of its memory, dense bfloat16 FLOP/s of its matrix units."""

    bandwidth: float
    flops: float
    memory: float = 0.0
    """Bytes; 0 where they do not matter."""
    link: float = 0.0
    """Bytes/s to the other GPUs of its node, in one direction; 0 without NVLink."""


GPUS: dict[str, Gpu] = {
    # NVIDIA's datasheets; matrix peaks are the dense ones. The longest matching name wins.
    "NVIDIA H200": Gpu(4.8e12, 989e12, 141e9, 450e9),
    "NVIDIA H100 80GB HBM3": Gpu(3.35e12, 989e12, 80e9, 450e9),  # SXM
    "NVIDIA H100 PCIe": Gpu(2.0e12, 756e12, 80e9),
    "NVIDIA H100 NVL": Gpu(3.9e12, 835e12, 94e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Gpu(2.039e12, 312e12, 80e9, 300e9),
    "NVIDIA A100-SXM4-40GB": Gpu(1.555e12, 312e12, 40e9, 300e9),
    "NVIDIA A100 80GB PCIe": Gpu(1.935e12, 312e12, 80e9),
    "NVIDIA L40S": Gpu(0.864e12, 362e12, 48e9),
    "NVIDIA L4": Gpu(0.3e12, 121e12, 24e9),
    "NVIDIA A10": Gpu(0.6e12, 125e12, 24e9),
    "NVIDIA GeForce RTX 4090": Gpu(1.008e12, 165e12, 24e9),
    "NVIDIA B200": Gpu(8.0e12, 2250e12, 180e9, 900e9),
}


def find_gpu(name: str | None, bandwidth_tb: float | None = None) -> Gpu | None:
    """Peaks of the GPU called ``name``, None if it is not in the table.

    Args:
        bandwidth_tb: measured or known bandwidth in TB/s; replaces the table's.
    """
    # With the space, so that an L40 is not taken for an L4.
    matches = [known for known in GPUS if name and f"{name} ".startswith(f"{known} ")]
    gpu = GPUS[max(matches, key=len)] if matches else None
    if bandwidth_tb is None:
        return gpu
    return Gpu(bandwidth_tb * 1e12, gpu.flops if gpu else float("inf"))


def find_by_part(part: str) -> tuple[str, Gpu] | None:
    """The first GPU of the table that has ``part`` among its name's words (``h100``, ``l4``)."""
    wanted = part.lower().replace("-", " ").split()
    for name, gpu in GPUS.items():
        words = name.lower().replace("-", " ").split()
        if wanted and all(word in words for word in wanted):
            return name, gpu
    return None


_PATIENCE_S = 20
"""Seconds for nvidia-smi, which hangs on some faulty GPUs."""


def gpu_info() -> dict[str, str] | None:
    """Name, driver and memory of the first GPU, None without one.

    It asks nvidia-smi, because torch would start CUDA in this process.
    """
    fields = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_PATIENCE_S
        )
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    values = process.stdout.splitlines()[0].split(", ")
    return dict(zip(("name", "driver", "memory"), values, strict=True))


def check_device(name: str | None) -> None:
    """Refuse ``--device cuda`` on a machine without a GPU.

    Args:
        name: what ``--device`` says; None if it is not given.

    Raises:
        UserError: there is no GPU.
    """
    # A container may have the GPU and no nvidia-smi.
    if name == "cuda" and gpu_info() is None and not list(Path("/dev").glob("nvidia[0-9]*")):
        raise UserError(
            "--device cuda: this machine has no GPU that nvidia-smi knows of. Give --device cpu, "
            "or leave it out for what there is."
        )
