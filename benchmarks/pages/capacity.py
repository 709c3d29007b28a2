# SPDX-License-Identifier: Apache-2.0
"""A capacity plan on paper: GPUs and GPU hours with and without LayerSkip.

    python -m benchmarks.pages.capacity --shape llama-3-8b --gpu h100 --prompt 1000 --output 300 \\
        --exit-layer 4 --num-speculative-tokens 4 --acceptance-length 3.0 --tokens-per-s 20000

docs/capacity.md has the formula and its assumptions; ``--write`` makes that page's tables again. An
engine is a group of ``--tp`` GPUs that hold one copy of the model. Nothing here was measured: where
results of your machine exist, use them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

from benchmarks.engines.command_line import make_parser, mistakes_reported, positive_int
from benchmarks.engines.markdown import markdown
from benchmarks.engines.presets import expected_length
from benchmarks.pages.capacity_formula import (
    Assumptions,
    Engine,
    EnginePlan,
    RequestKind,
    best_engine_plan,
    gpu_hours_per_million,
    layerskip_up_to,
    plan_engine,
)
from benchmarks.pages.capacity_tables import PAGE, TABLES
from benchmarks.pages.tables import write_tables
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.hardware import GPUS, find_by_part
from vllm_layerskip.measuring.roofline import Decoding
from vllm_layerskip.measuring.shapes import SHAPES

HEADER = ("", "K", "batch", "ms a token", "tok/s of an engine", "GPUs for the load",
          "GPU hours a million tokens", "cost a million tokens, with headroom")  # fmt: skip


def own_table(args: argparse.Namespace) -> str:
    """The plan for the requests that the command line describes.

    Raises:
        UserError: an option is wrong; the message names it.
    """
    found = find_by_part(args.gpu)
    if found is None:
        raise UserError(f"--gpu {args.gpu} is none of {', '.join(GPUS)}.")
    _check_drafting(args)
    assumptions = replace(
        Assumptions(), decode_efficiency=args.decode_efficiency, headroom=args.headroom
    )
    name, gpu = found
    engine = Engine(SHAPES[args.shape], gpu, args.tp, assumptions=assumptions)
    kind = RequestKind(args.prompt, args.output, args.max_tpot_ms / 1e3)
    drafting = layerskip_up_to(args.exit_layer, args.acceptance_length, args.num_speculative_tokens)
    body = [
        ["plain", *_columns(args, engine, plan_engine(engine, kind, Decoding("plain")))],
        ["LayerSkip", *_columns(args, engine, best_engine_plan(engine, kind, drafting))],
    ]
    return f"{args.shape} on {args.tp} x {name}\n\n{markdown(HEADER, body)}"


def _check_drafting(args: argparse.Namespace) -> None:
    num_layers = SHAPES[args.shape].num_layers
    if not 1 <= args.exit_layer < num_layers:
        raise UserError(
            f"--exit-layer {args.exit_layer} must be from 1 to {num_layers - 1} for {args.shape}."
        )
    longest = expected_length(1.0, args.num_speculative_tokens)
    if not 1 <= args.acceptance_length <= longest:
        raise UserError(
            f"--acceptance-length {args.acceptance_length} must be from 1 to {longest:.0f} for "
            f"--num-speculative-tokens {args.num_speculative_tokens}."
        )


def _columns(args: argparse.Namespace, engine: Engine, plan: EnginePlan | None) -> list[str]:
    """A plan's texts under ``HEADER``, without its name."""
    if plan is None:
        return ["does not fit"] * (len(HEADER) - 1)
    num_gpus = plan.num_engines(args.tokens_per_s, args.headroom) * args.tp
    hours = gpu_hours_per_million(engine, plan)
    cost = hours * args.price * (1 + args.headroom)
    return [
        str(plan.num_speculative_tokens), str(plan.batch_size), f"{1e3 * plan.tpot_s:.2f}",
        f"{plan.tokens_per_s:,.0f}", str(num_gpus), f"{hours:.4f}", f"{cost:.3f}",
    ]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--table", choices=TABLES, help="One of docs/capacity.md's tables.")
    parser.add_argument("--write", action="store_true", help="Make that page's tables again.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--gpu", default="h100", help="A part of its name. Default: h100.")
    parser.add_argument("--tp", type=positive_int, default=1, help="GPUs an engine. Default: 1.")
    parser.add_argument("--prompt", type=positive_int, default=1000, help="Tokens. Default: 1000.")
    parser.add_argument("--output", type=positive_int, default=300, help="Tokens. Default: 300.")
    parser.add_argument("--exit-layer", type=int, default=4, metavar="E")
    parser.add_argument("--num-speculative-tokens", type=positive_int, default=4, metavar="K")
    parser.add_argument(
        "--acceptance-length", type=float, default=3.0, metavar="A", help="At K. Default: 3.0."
    )
    parser.add_argument("--max-tpot-ms", type=float, default=math.inf, help="Limit a token.")
    parser.add_argument("--tokens-per-s", type=float, default=10_000, help="Mean output load.")
    parser.add_argument(
        "--price", type=float, default=1.0, help="Of a GPU hour. Default: 1.0, a unit."
    )
    parser.add_argument("--decode-efficiency", type=float, default=Assumptions.decode_efficiency)
    parser.add_argument("--headroom", type=float, default=Assumptions.headroom)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.write:
        write_tables(PAGE, TABLES)
    elif args.table:
        print(TABLES[args.table]())
    else:
        with mistakes_reported(parser):
            print(own_table(args))


if __name__ == "__main__":
    main()
