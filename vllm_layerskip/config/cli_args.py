# SPDX-License-Identifier: Apache-2.0
"""LayerSkip's own flags of ``vllm serve`` and ``vllm bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vllm_layerskip.config.early_exit import FLAG as EARLY_EXIT_FLAG
from vllm_layerskip.config.early_exit import KEY as EARLY_EXIT_KEY
from vllm_layerskip.config.options import ALL, AUTO
from vllm_layerskip.config.request import METHOD, OWN_KEYS, SELF, with_option
from vllm_layerskip.twins.kinds import CHOICES


def wrap_add_cli_args(original: Callable) -> Callable:
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        add_layerskip_args(parser)
        return parser

    return add_cli_args


def add_layerskip_args(parser: argparse.ArgumentParser) -> None:
    """Add our flags, and the long names of vLLM's ``--spec-model`` and ``--spec-tokens``."""
    group = parser.add_argument_group(
        title="LayerSkip",
        description="Self-speculative decoding with the model's own first layers "
        f"(--spec-model '{SELF}').",
    )
    _add_own_flags(group)
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


def _add_own_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--exit-layer",
        type=exit_layer_argument,
        default=None,
        help="Number of layers that draft, from 1 to the model's layers - 1, or 'auto' "
        "(the default) to read it from the checkpoint's config.json. With --draft-quantization "
        "also 'all'.",
    )
    group.add_argument(
        "--draft-quantization",
        choices=(AUTO, *CHOICES),
        default=None,
        help="Let the layers that draft have weights of fewer bits, made when the model is loaded; "
        "output stays the model's. 'none' for the model's own weights; 'auto' (the default) for "
        "what the checkpoint's config.json says.",
    )
    group.add_argument(
        "--draft-adapter",
        metavar="FOLDER",
        default=None,
        help="A LoRA adapter (a folder of peft, as 'vllm-layerskip train' makes it) for the layers "
        "that draft; output stays the model's. 'none', or 'auto' (the default) for the folder that "
        "the checkpoint's config.json names, if it names one.",
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


def exit_layer_argument(text: str) -> int | str:
    """The type of ``--exit-layer``, for argparse.

    Raises:
        ArgumentTypeError: neither an integer nor ``auto`` nor ``all``.
    """
    if text in (AUTO, ALL):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"exit_layer={text!r} must be an integer, 'auto' or 'all'."
        ) from None


def wrap_from_cli_args(original: Callable) -> Callable:
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        for key in sorted(OWN_KEYS):
            value = getattr(args, key, None)
            if value is not None:
                engine_args.speculative_config = with_option(
                    engine_args.speculative_config, key, value, f"--{key.replace('_', '-')}"
                )
        early_exit_layer = getattr(args, EARLY_EXIT_KEY, None)
        if early_exit_layer is not None:
            engine_args.hf_overrides = _with_early_exit(engine_args.hf_overrides, early_exit_layer)
        return engine_args

    return from_cli_args


def _with_early_exit(hf_overrides: dict[str, Any] | None, value: int) -> dict[str, Any]:
    given = hf_overrides or {}
    if EARLY_EXIT_KEY in given:
        raise ValueError(
            f"{EARLY_EXIT_FLAG} and --hf-overrides['{EARLY_EXIT_KEY}'] are mutually exclusive. "
            "Give one."
        )
    return {**given, EARLY_EXIT_KEY: value}
