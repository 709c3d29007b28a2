# SPDX-License-Identifier: Apache-2.0
"""``vllm-layerskip self-chats`` that ends in time, with the chats that it has.

    python -m benchmarks.gpu.self_chats --time-limit 100 --output chats.jsonl -- \\
        --model MODEL --num-chats 8000

How many chats a second a machine makes is not known before it has made some. What stands behind
``--`` are options of ``vllm-layerskip self-chats``. If the output is there, nothing is made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines.command_line import make_parser

RESERVE_S = 15.0
"""For the file of chats, and for the end of the engine."""


def until(deadline: float, answers: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """``answers`` that ends at a time (``time.monotonic``), but not without an answer."""

    def in_time(rows: Iterable[Any], settings: Any) -> Iterator[Any]:
        for answer in answers(rows, settings):
            yield answer
            if time.monotonic() > deadline:
                return

    return in_time


def main() -> int:
    """Make chats; the exit status."""
    start = time.monotonic()
    parser = make_parser(__doc__)
    parser.add_argument("--time-limit", type=float, required=True, metavar="S")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="Of self-chats.")
    args = parser.parse_args()
    if args.output.exists():
        print(f"{args.output} is there already.")
        return 0
    from vllm_layerskip.batch import one_engine
    from vllm_layerskip.commands import main as command

    one_engine.answers = until(  # type: ignore[assignment]
        start + args.time_limit - RESERVE_S, one_engine.answers
    )
    return command.main(["self-chats", "--output", str(args.output), *args.options])


if __name__ == "__main__":
    sys.exit(main())
