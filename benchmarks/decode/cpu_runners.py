# SPDX-License-Identifier: Apache-2.0
"""What a decoding step costs on a CPU: Model Runner V2 beside vLLM's V1 runner.

    python -m benchmarks.decode.cpu_runners --output benchmarks/results/cpu-runners.json

    python -m benchmarks.decode.cpu_runners --tiny        # a rehearsal; its times mean nothing

Plain greedy decoding of a 1B shape with a vocabulary of 128k. V1 runs with native kernels, V2 with
Triton's interpreter and the plugin's torch functions in place of the hot kernels. If the ratio is
near 1, what LayerSkip gains or loses on a CPU comes from the model and not from the interpreter.

Each runner has a process of its own, and the runners take turns, so that a busy machine slows
both. A run's time is the median of its steps; the shortest of all runs counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.decode.prompts import make_prompts
from benchmarks.engines.command_line import make_parser, positive_int
from benchmarks.engines.results import write_result
from vllm_layerskip.measuring.provenance import provenance
from vllm_layerskip.measuring.shapes import SHAPES
from vllm_layerskip.measuring.timing import run_steps

if TYPE_CHECKING:
    from vllm import LLM

RUNNERS = ("v1", "v2")
PROMPT_LEN = 32


def environment(runner: str) -> dict[str, str]:
    """The variables of a runner's process."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return variables | ({"TRITON_INTERPRET": "1"} if runner == "v2" else {})


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode each batch size ``--runs`` times in this process."""
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as folder:
        model = shape.write_config(Path(folder) / "model", _max_model_len(args))
        llm = _start_engine(model, args)
        module = llm.collective_rpc(_runner_module)[0]
        assert ("cpu_model_runner" in module) == (args.runner == "v1"), module
        prompts = make_prompts("random", max(args.batch_sizes), PROMPT_LEN, shape.vocab_size, model)
        records = []
        for batch_size in args.batch_sizes:
            run_steps(llm, prompts[:batch_size], 8)
            runs = [run_steps(llm, prompts[:batch_size], args.output_len) for _ in range(args.runs)]
            step_ms = [median_step_ms([step.seconds for step in steps]) for steps in runs]
            records.append({"runner": args.runner, "batch_size": batch_size, "step_ms": step_ms})
        return records


def _max_model_len(args: argparse.Namespace) -> int:
    return PROMPT_LEN + args.output_len + 1


def _start_engine(model: Path, args: argparse.Namespace) -> LLM:
    from vllm import LLM

    return LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=_max_model_len(args),
        max_num_seqs=max(args.batch_sizes),
        enforce_eager=args.enforce_eager,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
    )


def _runner_module(worker: Any) -> str:
    return type(worker.model_runner).__module__


def median_step_ms(seconds: list[float]) -> float:
    """The median of a run's decoding steps.

    The first step belongs to prefill, and the last one to the end of the requests.
    """
    lengths = [later - earlier for earlier, later in itertools.pairwise(seconds[1:-1])]
    return round(1e3 * statistics.median(lengths), 3)


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shortest step of each runner and batch size, and the ratio V2 / V1."""
    summary = []
    for batch_size in sorted({record["batch_size"] for record in records}):
        shortest = {
            runner: min(
                step_ms
                for record in records
                if (record["runner"], record["batch_size"]) == (runner, batch_size)
                for step_ms in record["step_ms"]
            )
            for runner in RUNNERS
        }
        ratio = round(shortest["v2"] / shortest["v1"], 3)
        summary.append({"batch_size": batch_size, "step_ms": shortest, "v2_to_v1": ratio})
    return summary


def measure_in_turn(argv: list[str], repeats: int) -> list[dict[str, Any]]:
    """The records of ``repeats`` processes of each runner, which take turns."""
    records = []
    for _, runner in itertools.product(range(repeats), RUNNERS):
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.decode.cpu_runners", "--runner", runner, *argv],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment(runner),
        )
        records += json.loads(process.stdout.strip().splitlines()[-1])
    return records


def table(summary: list[dict[str, Any]]) -> Table:
    result = Table(title="Plain decoding on a CPU")
    for column in ("batch", "V1 ms / step", "V2 ms / step", "V2 / V1"):
        result.add_column(column, justify="right")
    for row in summary:
        v1, v2 = (row["step_ms"][runner] for runner in RUNNERS)
        result.add_row(str(row["batch_size"]), f"{v1:.1f}", f"{v2:.1f}", f"{row['v2_to_v1']:.2f}")
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 4])
    parser.add_argument("--output-len", type=positive_int, default=48)
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="Processes for each runner."
    )
    parser.add_argument(
        "--runs", type=positive_int, default=3, help="Runs of each batch in a process."
    )
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="A rehearsal: tiny shape, one run.")
    parser.add_argument("--runner", choices=RUNNERS, help="Measure one in this process.")
    parser.add_argument("--output", type=Path, help="JSON file.")
    args = parser.parse_args(argv)
    if args.tiny:
        args.shape, args.output_len, args.repeats, args.runs = "tiny", 8, 1, 1
        args.enforce_eager = True
    return args


def main() -> None:
    argv = sys.argv[1:]
    args = parse(argv)
    if args.runner is not None:
        print(json.dumps(measure(args)), flush=True)
        return
    records = measure_in_turn(argv, args.repeats)
    summary = summarise(records)
    Console(width=100).print(table(summary))
    if args.output is not None:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        content = {
            "provenance": provenance(),
            "settings": settings | {"prompt_len": PROMPT_LEN, "dtype": "bfloat16"},
            "summary": summary,
            "records": records,
        }
        write_result(args.output, content, indent=2)


if __name__ == "__main__":
    main()
