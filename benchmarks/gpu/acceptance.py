# SPDX-License-Identifier: Apache-2.0
"""How many drafts a real model accepts, with a draft adapter and without one.

    python -m benchmarks.gpu.acceptance --model MODEL --adapter FOLDER \\
        --questions question.jsonl --dtype bfloat16 --output FILE.json

It is ``benchmarks.prompts.real_prompts`` with four modes, each in a process of its own: plain
vLLM; the drafts of the adapter; all layers in int4; the adapter's layers in int4. Without an
adapter, because its training failed, only the first and the third are asked. Requests run sixteen
at once, with graphs alone and the engine in the process of its caller, which starts faster. So
acceptance is what this measures, and speeds are not those of a server.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser
from vllm_layerskip.measuring.processes import exit_on_sigterm

BATCH_SIZE, NUM_QUESTIONS, MAX_TOKENS, MAX_MODEL_LEN = 16, 104, 192, 2048
TINY = (2, 2, 8, 256)
K = 4
RECORD = "layerskip_adapter.json"


def drafts(adapter: Path) -> list[str]:
    """What ``--drafts`` gets; the most telling first."""
    int4 = {"draft_quantization": "int4", "num_speculative_tokens": K}
    named = {"int4": {"exit_layer": "all", **int4}}
    record = adapter / RECORD
    if record.exists():
        exit_layer = json.loads(record.read_text(encoding="utf-8"))["exit_layer"]
        own: dict[str, Any] = {"exit_layer": exit_layer, "draft_adapter": str(adapter)}
        full = own | {"draft_quantization": "none", "num_speculative_tokens": K}
        named = {"adapter": full, **named, "adapter int4": own | int4}
    return [f"{name}={json.dumps(config)}" for name, config in named.items()]


def engine_args(dtype: str, device: str) -> dict[str, Any]:
    """Engines that start fast: few graphs, no torch.compile, no JIT warm-up."""
    if device == "cpu":
        return {}
    sizes = sorted({n * size for n in (1, 1 + K) for size in (1, BATCH_SIZE // 2, BATCH_SIZE)})
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    found: dict[str, Any] = {
        "compilation_config": graphs,
        "kernel_config": {"enable_jit_warmup": False},
        "gpu_memory_utilization": 0.5,
    }
    if dtype == "float32":
        found["attention_backend"] = "TRITON_ATTN"  # FlashAttention takes no float32.
    return found


def command(args: argparse.Namespace) -> list[str]:
    """Arguments of ``benchmarks.prompts.real_prompts``."""
    device = "cpu" if args.tiny else "cuda"
    sizes = TINY if args.tiny else (BATCH_SIZE, NUM_QUESTIONS, MAX_TOKENS, MAX_MODEL_LEN)
    names = ("--batch-size", "--num-questions", "--max-tokens", "--max-model-len")
    return [
        *("--model", str(args.model), "--questions", str(args.questions), "--chat"),
        *("--output", str(args.output), "--resume", "--repeats", "1"),
        *(part for pair in zip(names, map(str, sizes), strict=True) for part in pair),
        *("--dtype", args.dtype, "--device", device, *["--enforce-eager"] * args.tiny),
        *("--engine-args", json.dumps(engine_args(args.dtype, device))),
        *("--drafts", *drafts(args.adapter)),
    ]


def main() -> int:
    """Ask all modes; the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="Folder; need not exist.")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="A rehearsal on a CPU.")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Triton's products of float32 are TF32 otherwise.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    from benchmarks.prompts import real_prompts

    sys.argv = [real_prompts.__file__, *command(args)]
    return real_prompts.main()


if __name__ == "__main__":
    with exit_on_sigterm():
        sys.exit(main())
