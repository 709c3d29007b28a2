# SPDX-License-Identifier: Apache-2.0
"""Does LayerSkip on CUDA graphs write plain decoding's tokens? On a trained checkpoint, greedily.

    python -m benchmarks.gpu.check_graphs --output exact.json
    python -m benchmarks.gpu.check_graphs --dtype bfloat16 --output bf16.json
    python -m benchmarks.gpu.check_graphs --dtype bfloat16 --draft-quantization int4 --output x.json

Engines follow each other in one process, with FULL decode graphs and without torch.compile: plain
vLLM, then LayerSkip. Each answers the same prompts, all at once. The check fails if

* an answer differs where the two best tokens are further apart than rounding explains, or answers
  differ so early that little was compared,
* no draft was accepted, or most verify steps did not start from exit states,
* on a GPU, most steps did not replay their graph: then the check would have tested eager steps.

Batches of other sizes sum in another order, so two tokens of nearly the same logit can change
places, in float32 too. So ``gap`` is measured at the first token that differs: by how much plain
decoding's log-probability of its token exceeds that of LayerSkip's token. In bfloat16 gaps are
larger, so LayerSkip without reuse runs as well: its gaps are rounding, since its verification is
vLLM's own. So is that of a draft twin, which reuses nothing; in float32 a twin has rounded weights
and exact arithmetic, in bfloat16 vLLM's kernels for its kind.

Meanwhile vLLM looks for waits of the host for the GPU (VLLM_GPU_SYNC_CHECK). Those that plain
decoding does not have are named, but are no fault: they cost speed.

On a GPU float32 needs Triton's attention; bfloat16 runs what users run, FlashAttention 3. If
LayerSkip fails, more engines follow, each without one part of it: the first that passes says where
to look. Each has a process of its own, since a CUDA error stays with the process that had it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser, mistakes_reported, positive_int
from benchmarks.engines.results import write_result
from benchmarks.gpu.graph_engines import (
    AS_SERVED,
    VARIANTS,
    WITHOUT_REUSE,
    Check,
    prepare_environment,
)
from benchmarks.gpu.verdict import ROUNDING, Answers, line_of
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.files.tokenizers import load_tokenizer
from vllm_layerskip.measuring.provenance import provenance
from vllm_layerskip.twins.kinds import CHOICES, NONE


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(embedded_checkpoint()))
    parser.add_argument("--dtype", choices=sorted(ROUNDING), default="float32")
    parser.add_argument("--exit-layer", type=positive_int, default=3, help="E")
    parser.add_argument("--num-speculative-tokens", type=positive_int, default=5, help="K")
    parser.add_argument("--draft-quantization", choices=CHOICES, default=NONE, help="Draft twin.")
    parser.add_argument("--num-prompts", type=positive_int, default=8)
    parser.add_argument("--max-tokens", type=positive_int, default=64)
    parser.add_argument("--variant", choices=VARIANTS, help="This one engine alone.")
    parser.add_argument("--output", type=Path, required=True, help="Result file.")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    prepare_environment()
    with mistakes_reported(parser):
        load_tokenizer(args.model, "--model")  # Before the engines: they take long to start.
    args.output.unlink(missing_ok=True)  # An older one must not pass for this run's.
    check = Check(args)
    plain = check.run_plain()
    result: dict[str, Any] = {
        "dtype": args.dtype,
        "checks": [],
        "arguments": {key: value for key, value in check.arguments.items() if key != "model"},
        "speculative_config": check.request,
        "provenance": provenance(),
    }
    reuse_may_differ = args.dtype != "float32" and args.draft_quantization == NONE
    wanted = [AS_SERVED, WITHOUT_REUSE] if reuse_may_differ else [AS_SERVED]
    for variant in [args.variant] if args.variant else wanted:
        _add(result, args.output, _run(check, variant, plain))
    if any(one["problems"] for one in result["checks"]):
        if not args.variant:
            _narrow_down(result, args.output, VARIANTS if check.on_gpu else VARIANTS[:2])
        sys.exit(1)


def _run(check: Check, variant: str, plain: Answers) -> dict[str, Any]:
    try:
        return check.run(variant, plain)
    except Exception as error:
        traceback.print_exc()
        return {"variant": variant, "problems": [f"{type(error).__name__}: {error}"[:300]]}


def _add(result: dict[str, Any], output: Path, one: dict[str, Any]) -> None:
    result["checks"].append(one)
    write_result(output, result)
    print(line_of(one, result["dtype"]), flush=True)


def _narrow_down(result: dict[str, Any], output: Path, variants: Sequence[str]) -> None:
    """Run the variants that did not run yet, each in a process of its own."""
    done = {one["variant"] for one in result["checks"]}
    for variant in variants:
        if variant in done:
            continue
        apart = output.with_suffix(".variant")
        command = [sys.executable, "-m", "benchmarks.gpu.check_graphs", *sys.argv[1:]]
        command += ["--variant", variant, "--output", str(apart)]  # The last ones count.
        subprocess.run(command, check=False)
        one = {"variant": variant, "problems": ["its process ended without a result"]}
        if apart.exists():
            (one,) = json.loads(apart.read_text(encoding="utf-8"))["checks"]
            apart.unlink()
        _add(result, output, one)


if __name__ == "__main__":
    main()
