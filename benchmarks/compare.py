# SPDX-License-Identifier: Apache-2.0
"""Measure several modes and batch sizes, each in a process of its own, and make a table.

    python benchmarks/compare.py --shape llama-2-7b --exit-layer 8 --num-speculative-tokens 12 \\
        --synthetic-acceptance-length 9.27 --batch-sizes 1 4 16 32 --output results/7b.json

`--device cpu --tiny` rehearses the same path on a CPU in a few seconds; its speeds mean nothing.
The limit column is the speed-up by bytes read at batch size 1, where decoding is bound by them:
acceptance length * full / (K * (early + head) + full), in bytes of weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import MODES, SHAPES, add_arguments
from rich.console import Console
from rich.table import Table


def byte_limit(shape: dict[str, int], exit_layer: int, num_drafts: int, length: float) -> float:
    """Upper bound of the speed-up at batch size 1 (docs/design.md, "What it costs")."""
    head_size = shape["h"] // shape["a"]
    attention = shape["h"] * head_size * (2 * shape["a"] + 2 * shape["k"])
    layer = attention + 3 * shape["h"] * shape["i"]
    head = shape["h"] * shape["v"]
    full = shape["l"] * layer + head
    return length * full / (num_drafts * (exit_layer * layer + head) + full)


def measure(mode: str, batch_size: int, argv: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("measure.py")), "--mode", mode]
    command += ["--batch-size", str(batch_size), *argv]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in process.stdout.splitlines() if line.startswith("RECORD ")]
    if not lines:
        return {"mode": mode, "batch_size": batch_size, "error": process.stderr[-2000:]}
    return json.loads(lines[0].removeprefix("RECORD "))


def table(records: list[dict[str, Any]], limit: float | None) -> Table:
    result = Table(title="Decoding, tokens/s")
    for column in ("batch", "mode", "tok/s", "x plain", "limit", "acceptance", "reused / steps"):
        result.add_column(column, justify="right")
    plain = {r["batch_size"]: r for r in records if r["mode"] == "plain" and "error" not in r}
    for record in records:
        if "error" in record:
            last = (record["error"].strip().splitlines() or ["no output"])[-1]
            result.add_row(str(record["batch_size"]), record["mode"], "failed", last[:60])
            continue
        base = plain.get(record["batch_size"])
        speed = record["decode_tokens_per_s"]
        ratio = f"{speed / base['decode_tokens_per_s']:.2f}" if base else ""
        reused = record.get("num_verify_steps_reused")
        is_ours = reused is not None
        result.add_row(
            str(record["batch_size"]),
            record["mode"],
            f"{speed:.1f}",
            ratio,
            f"{limit:.2f}" if limit and is_ours and record["batch_size"] == 1 else "",
            f"{record['acceptance_length']:.2f}" if is_ours else "",
            f"{reused} / {reused + record['num_verify_steps_full']}" if is_ours else "",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES[:3]))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--tiny", action="store_true", help="A rehearsal: tiny shape, few tokens.")
    parser.add_argument("--output", type=Path, help="JSON file for all records.")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.prompt_len, args.output_len, args.repeats = "tiny", 16, 12, 1
        args.exit_layer, args.batch_sizes = 2, [1, 2]
        args.dtype, args.enforce_eager = "float32", True

    shared = ["exit_layer", "num_speculative_tokens", "synthetic_acceptance_length", "prompt_len"]
    shared += ["output_len", "repeats", "dtype", "device", "model", "shape"]
    argv = ["--enforce-eager"] if args.enforce_eager else []
    for name in shared:
        value = getattr(args, name)
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", str(value)]

    records = [
        measure(mode, batch_size, argv) for batch_size in args.batch_sizes for mode in args.modes
    ]
    limit = None
    if args.model is None and args.synthetic_acceptance_length is not None:
        limit = byte_limit(
            SHAPES[args.shape],
            args.exit_layer,
            args.num_speculative_tokens,
            args.synthetic_acceptance_length,
        )
    Console(width=110).print(table(records, limit))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": sys.argv, "byte_limit": limit, "records": records}
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if any("error" in record for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
