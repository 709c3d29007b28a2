# SPDX-License-Identifier: Apache-2.0
"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_layerskip.errors import UserError


def make_parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


@contextmanager
def mistakes_reported(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the program for a ``UserError`` as for a wrong option: a line on stderr, status 2."""
    try:
        yield
    except UserError as error:
        parser.error(str(error))


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """``--output`` and ``--resume``."""
    parser.add_argument("--output", type=Path, help="Result file.")
    parser.add_argument("--resume", action="store_true", help="Go on with --output.")


def check_output(args: argparse.Namespace) -> None:
    """Refuse to add to an older file that was not meant.

    Raises:
        UserError: ``--output`` exists, and ``--resume`` is not given.
    """
    if args.output is not None and args.output.exists() and not args.resume:
        raise UserError(f"--output={args.output} exists. Add --resume, or choose another file.")


def positive_int(text: str) -> int:
    """The type of an option that counts something.

    Raises:
        ArgumentTypeError: it is no integer of at least 1.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return number
