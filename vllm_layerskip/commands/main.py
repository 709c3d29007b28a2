# SPDX-License-Identifier: Apache-2.0
"""The console script ``vllm-layerskip``: tools around a checkpoint, each a subcommand.

A subcommand is a module of ``vllm_layerskip.commands`` with ``add_arguments(parser)`` and
``run(args)``; list it in ``COMMANDS``. Importing it must be cheap: ``run`` imports what is
heavy (vLLM, torch, transformers).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm_layerskip import __version__
from vllm_layerskip.commands import COMMANDS
from vllm_layerskip.errors import UserError
from vllm_layerskip.host import version


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status: 0; 2 for a mistake of the user, explained in one line on stderr; 130
        after Ctrl-C. Any other error is a defect and keeps its traceback.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.argv = [parser.prog, *(sys.argv[1:] if argv is None else argv)]
    try:
        args.run(args)
    except UserError as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _CommandParser(argparse.ArgumentParser):
    """A command's parser; a mistake is one line, as every other one, without the usage."""

    def error(self, message: str) -> NoReturn:
        reason = " ".join(message.split()).rstrip(".")
        self.exit(2, f"{self.prog}: error: {reason}. See {self.prog} --help.\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-layerskip",
        description="Tools for LayerSkip self-speculative decoding with vLLM.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__} (vLLM {version.vllm_version()})",
    )
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for command in COMMANDS:
        module = importlib.import_module(command.module)
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
