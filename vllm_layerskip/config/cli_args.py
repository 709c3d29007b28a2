# SPDX-License-Identifier: Apache-2.0
"""Flags of ``vllm serve`` and ``vllm bench`` that vLLM does not have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from vllm_layerskip.config.early_exit import FLAG as EARLY_EXIT_FLAG
from vllm_layerskip.config.early_exit import KEY as EARLY_EXIT_KEY
from vllm_layerskip.config.options import METHOD, SELF, parse_exit_layer


def wrap_add_cli_args(original: Callable) -> Callable:
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        add_layerskip_args(parser)
        return parser

    return add_cli_args


def add_layerskip_args(parser: argparse.ArgumentParser) -> None:
    """Add our flags, and the long names of vLLM's ``--spec-model`` and ``--spec-tokens``."""
    known = dict(parser._option_string_actions)
    group = parser.add_argument_group(
        title="LayerSkip",
        description="Self-speculative decoding with the model's own first layers "
        f"(--spec-model '{SELF}').",
    )
    group.add_argument(
        "--exit-layer",
        type=_exit_layer,
        default=None,
        help="Number of layers that draft, from 1 to the model's layers - 1, or 'auto' "
        "(the default) to read it from the checkpoint's config.json.",
    )
    group.add_argument(
        "--reuse-exit-states",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Reuse the drafts' exit states in verification (the default).",
    )
    group.add_argument(
        "--draft-vocab",
        metavar="FILE",
        default=None,
        help="File of the token ids that drafts may be ('vllm-layerskip draft-vocab' makes "
        "one), 'none' for the whole vocabulary, or 'auto' (the default) for the file that the "
        "checkpoint's config.json names, if it names one.",
    )
    group.add_argument(
        EARLY_EXIT_FLAG,
        type=int,
        metavar="E",
        default=None,
        help="Serve the model cut after its first E layers, without verification: faster, and "
        "lossy. Excludes speculation.",
    )
    group.add_argument(
        "--speculative-model",
        dest="spec_model",
        default=None,
        help=f"The same as --spec-model; '{SELF}' asks for LayerSkip.",
    )
    group.add_argument(
        "--num-speculative-tokens",
        dest="spec_tokens",
        type=int,
        default=None,
        help="The same as --spec-tokens.",
    )
    for action in parser._actions:
        if action.dest == "spec_method" and action.choices is not None:
            action.choices = [*action.choices, METHOD]
    for flag in parser._option_string_actions.keys() - known.keys():
        _keep_abbreviations(parser, known, flag)


def _keep_abbreviations(
    parser: argparse.ArgumentParser, known: Mapping[str, argparse.Action], flag: str
) -> None:
    """What abbreviated one of vLLM's flags before we added ``flag`` goes on doing so."""
    for end in range(len("--x"), len(flag)):
        abbreviation = flag[:end]
        meant = {id(a): a for name, a in known.items() if name.startswith(abbreviation)}
        if len(meant) == 1:
            (action,) = meant.values()
            parser._option_string_actions.setdefault(abbreviation, action)


def wrap_from_cli_args(original: Callable) -> Callable:
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        own = {
            "exit_layer": getattr(args, "exit_layer", None),
            "draft_vocab": getattr(args, "draft_vocab", None),
            "reuse_exit_states": getattr(args, "reuse_exit_states", None),
        }
        for key, value in own.items():
            if value is not None:
                engine_args.speculative_config = _merged(engine_args.speculative_config, key, value)
        early_exit_layer = getattr(args, EARLY_EXIT_KEY, None)
        if early_exit_layer is not None:
            engine_args.hf_overrides = _with_early_exit(engine_args.hf_overrides, early_exit_layer)
        return engine_args

    return from_cli_args


def _merged(speculative_config: dict[str, Any] | None, key: str, value: object) -> dict[str, Any]:
    flag = f"--{key.replace('_', '-')}"
    given = speculative_config or {}
    if key in given or key.replace("_", "-") in given:
        raise ValueError(
            f"{flag} and --speculative-config['{key}'] are mutually exclusive. Give one."
        )
    return {**given, key: value}


def _with_early_exit(hf_overrides: dict[str, Any] | None, value: int) -> dict[str, Any]:
    given = hf_overrides or {}
    if EARLY_EXIT_KEY in given:
        raise ValueError(
            f"{EARLY_EXIT_FLAG} and --hf-overrides['{EARLY_EXIT_KEY}'] are mutually exclusive. "
            "Give one."
        )
    return {**given, EARLY_EXIT_KEY: value}


def _exit_layer(text: str) -> int | str:
    try:
        return parse_exit_layer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
