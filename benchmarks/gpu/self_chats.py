# SPDX-License-Identifier: Apache-2.0
"""``vllm-layerskip self-chats`` in the time of a session's part, unless its output is there.

    python -m benchmarks.gpu.self_chats --time-limit 100 --output chats.jsonl -- \\
        --model MODEL --num-chats 8000

What stands behind ``--`` are options of ``vllm-layerskip self-chats``. That command would go on for
as long again in a session that is called again, when an adapter is trained already.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.engines.command_line import make_parser

RESERVE_S = 15.0
"""For the file of chats, and for the end of the engine."""


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
    from vllm_layerskip.commands import main as command

    minutes = (args.time_limit - RESERVE_S - (time.monotonic() - start)) / 60
    where = ("--output", str(args.output), "--max-minutes", f"{minutes:.3f}")
    return command.main(["self-chats", *where, *args.options])


if __name__ == "__main__":
    sys.exit(main())
