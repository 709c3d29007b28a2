# SPDX-License-Identifier: Apache-2.0
"""Measure the modes of one table, each in a process of its own, and print it.

    python -m benchmarks.decode.compare --preset 7b-cnndm --batch-sizes 1 4 16 32 \\
        --output benchmarks/results/7b-cnndm.json

    python -m benchmarks.decode.compare --device cpu --tiny        # a rehearsal of every process

Every cell is in the file as soon as it is measured. ``--resume`` goes on with a file and measures
what it lacks. A mode that fails leaves its error in the file, and the others run.

``--rounds 3`` runs the whole table three times, A B A B A B, so that a drift of the machine is not
taken for a difference; the table has medians, and the range of the rounds' speed-ups.
``--interleave 10`` does so with engines that stay alive and take turns of seconds; all of them must
fit in memory at once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.decode.interleaved import check_memory, run_interleaved
from benchmarks.decode.processes import (
    ModeProcess,
    draft_processes,
    drafts,
    in_rounds,
    mode_processes,
)
from benchmarks.decode.running import RunOptions, run_mode
from benchmarks.decode.summary import baseline_settings, decode_results, rich_table
from benchmarks.engines.command_line import (
    add_output_arguments,
    check_output,
    make_parser,
    mistakes_reported,
    positive_int,
)
from benchmarks.engines.modes import MODES, TRANSFORMERS_MODES
from benchmarks.engines.results import OUT_OF_TIME, Record, load_records
from benchmarks.engines.settings import add_arguments, settings_from
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.processes import exit_on_sigterm

DEFAULT_MODES = ("plain", "layerskip", "layerskip-no-reuse", "draft-model")


def records_of(table: Sequence[ModeProcess], records: Iterable[Record]) -> Iterator[Record]:
    """Records of this table, with the baseline that an earlier one left in the file."""
    known = [(one.mode, one.settings.identity()) for one in table]
    baselines = [baseline_settings(one.settings.identity()) for one in table]
    for record in records:
        is_baseline = (
            record["mode"] == "plain" and baseline_settings(record["settings"]) in baselines
        )
        if is_baseline or (record["mode"], record["settings"]) in known:
            yield record


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_arguments(parser, of_a_table=True)
    parser.add_argument(
        "--drafts",
        nargs="+",
        type=drafts,
        metavar="E:K[:KIND[:LENGTH]]",
        help="Mode layerskip once for each: exit layer or all, number of drafts, draft "
        "quantization, synthetic acceptance length.",
    )
    repetition = parser.add_mutually_exclusive_group()
    repetition.add_argument(
        "--rounds", type=positive_int, default=1, help="How often the whole table runs: A B A B."
    )
    repetition.add_argument(
        "--interleave",
        type=positive_int,
        metavar="N",
        help="N rounds of engines that stay alive and take turns, cell by cell.",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(DEFAULT_MODES))
    parser.add_argument("--bandwidth", type=float, help="TB/s of the GPU, for the limits.")
    parser.add_argument("--time-limit", type=float, help="Seconds for the whole table.")
    parser.add_argument(
        "--fresh-cache",
        action="store_true",
        help="Give each process empty compile caches: fair start times, slower starts.",
    )
    parser.add_argument("--no-table", action="store_true", help="Print the cells alone.")
    parser.add_argument("--note", help="A sentence on the setting, kept with every cell.")
    add_output_arguments(parser)
    return parser


def table_from(args: argparse.Namespace) -> list[ModeProcess]:
    """The processes that the options ask for, those of one round with ``--interleave``.

    Raises:
        UserError: options are missing or exclude each other.
    """
    if args.interleave:
        _check_interleave(args)
    several, kinds = args.num_speculative_tokens, args.draft_quantization
    args.num_speculative_tokens = several[0] if several else None
    args.draft_quantization = kinds[0] if kinds else None
    if args.drafts:
        _fill_from_drafts(args)
    settings = settings_from(args)
    if settings.model is None and set(args.modes) & set(TRANSFORMERS_MODES):
        raise UserError("--modes transformers… needs --model: it verifies drafts for real.")
    check_output(args)
    if args.resume:
        _check_resumable(args.output)
    twice = [mode for mode in args.modes if args.modes.count(mode) > 1]
    if twice:
        raise UserError(f"--modes names {twice[0]} twice. Leave one out.")
    if args.drafts:
        table = draft_processes(args.modes, settings, args.drafts)
    else:
        all_k = several or [settings.num_speculative_tokens]
        table = mode_processes(args.modes, settings, all_k, kinds or [settings.draft_quantization])
    if args.interleave:
        check_memory(table)
    return in_rounds(table, args.rounds)


def _check_interleave(args: argparse.Namespace) -> None:
    """Refuse what cannot take turns.

    Raises:
        UserError: an option excludes ``--interleave``.
    """
    option = f"--interleave={args.interleave}"
    others = [mode for mode in args.modes if mode in TRANSFORMERS_MODES]
    if others:
        raise UserError(
            f"{option} cannot go with --modes {' '.join(others)}: only vLLM's engines take turns. "
            f"Use --rounds={args.interleave}, or leave these modes out."
        )
    if args.resume:
        raise UserError(
            f"{option} cannot go with --resume: turns of two runs are not seconds apart. "
            "Choose another --output."
        )


def _check_resumable(output: Path) -> None:
    if any(record.get("interleaved") for record in load_records(output)):
        raise UserError(
            f"--resume cannot go on with {output}: its engines took turns (--interleave), and "
            "turns of two runs are not seconds apart. Choose another --output."
        )


def _fill_from_drafts(args: argparse.Namespace) -> None:
    """E and K of the first ``--drafts`` where no preset has them.

    Raises:
        UserError: options say the same as ``--drafts``.
    """
    names = ("exit_layer", "num_speculative_tokens", "draft_quantization")
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise UserError(
            f"--drafts cannot go with --{given[0].replace('_', '-')}, which it says itself. "
            "Give one of them."
        )
    if args.preset is None and not args.tiny:
        args.exit_layer = args.drafts[0].exit_layer
        args.num_speculative_tokens = args.drafts[0].num_speculative_tokens
        args.synthetic_acceptance_length = args.drafts[0].acceptance_length


def run_table(
    table: Sequence[ModeProcess], output: Path, options: RunOptions, interleave: int | None = None
) -> list[Record]:
    """Run all processes; the table's records.

    Args:
        interleave: rounds of processes that take turns; None runs one process after the other.

    Raises:
        UserError: ``output`` is another kind of file.
    """
    load_records(output)  # Before the first process starts.
    logs = output.with_suffix(".logs")
    if interleave is None:
        for one in table:
            run_mode(one, output, logs / f"{one.name}.log", options)
        return list(records_of(table, load_records(output)))
    run_interleaved(table, interleave, output, logs, options)
    return list(records_of(in_rounds(table, interleave), load_records(output)))


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    with mistakes_reported(parser):
        table = table_from(args)
        output = args.output or Path(tempfile.mkdtemp(prefix="compare-")) / "results.json"
        options = RunOptions(deadline, args.fresh_cache, args.note)
        records = run_table(table, output, options, args.interleave)
    if not args.no_table:
        Console(width=150).print(rich_table(decode_results(records, args.bandwidth)))
    failed = [record for record in records if record["status"] == "error"]
    for what in dict.fromkeys(f"{record['mode']}: {record['reason']}" for record in failed):
        print(f"{what}. Logs: {output.with_suffix('.logs')}")
    if args.output is None and not failed:  # Else the logs, which were named, are there.
        shutil.rmtree(output.parent)
    if failed:
        sys.exit(1)
    if any(record["status"] == "no-time" for record in records):
        sys.exit(OUT_OF_TIME)


if __name__ == "__main__":
    with exit_on_sigterm():
        main()
