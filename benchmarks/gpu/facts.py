# SPDX-License-Identifier: Apache-2.0
"""The machine of a session: its GPU, the bandwidth that its memory reaches, its versions.

    python -m benchmarks.gpu.facts --output gpu.json

The bandwidth is that of a device-to-device copy; bytes read and bytes written both count. A kernel
reaches no more, some 90 % of the datasheet's figure.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser, mistakes_reported
from benchmarks.engines.results import write_result
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.hardware import find_gpu
from vllm_layerskip.measuring.provenance import provenance

COPY_BYTES = 4 << 30
REHEARSAL_BYTES = 64 << 20


def copy_bandwidth(device: str, num_bytes: int, repeats: int = 5) -> float:
    """Bytes/s of a copy on ``device``: the median of ``repeats``, after a warm-up.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: torch finds no CUDA GPU. Use --device=cpu for a rehearsal.")

    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [_copy_s(source, target, device) for _ in range(repeats + 1)][1:]
    return 2 * num_bytes / statistics.median(seconds)


def _copy_s(source: Any, target: Any, device: str) -> float:
    import torch

    if device == "cpu":
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    facts = provenance()
    num_bytes = COPY_BYTES if args.device == "cuda" else REHEARSAL_BYTES
    with mistakes_reported(parser):
        bandwidth = copy_bandwidth(args.device, num_bytes)
    name = facts["gpu"]["name"] if facts["gpu"] else None
    known = find_gpu(name)
    result = {
        "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "datasheet_bandwidth_tb_s": known and known.bandwidth / 1e12,
        "provenance": facts,
    }
    write_result(args.output, result)
    versions = " ".join(f"{key} {value}" for key, value in facts["versions"].items())
    print(f"{name or facts['cpu']['model']}: a copy moves {bandwidth / 1e12:.3f} TB/s; {versions}")


if __name__ == "__main__":
    main()
