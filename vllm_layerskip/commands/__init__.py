# SPDX-License-Identifier: Apache-2.0
"""Subcommands of ``vllm-layerskip``, one module each."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    name: str
    module: str
    """With ``add_arguments(parser)`` and ``run(args)``; its docstring is the command's help."""
    summary: str


COMMANDS: tuple[Command, ...] = (
    Command(
        "draft-vocab",
        "vllm_layerskip.commands.draft_vocab",
        "Choose the token ids that drafts may be, from the texts that a model writes.",
    ),
    Command(
        "train",
        "vllm_layerskip.commands.train",
        "Train a model with layer dropout and the early-exit loss.",
    ),
    Command(
        "eval",
        "vllm_layerskip.commands.eval",
        "Perplexity, accuracy and agreement of every exit layer on held-out text.",
    ),
    Command(
        "tune",
        "vllm_layerskip.commands.tune",
        "Choose exit layer, drafts and batch-size schedule for a checkpoint, machine and prompts.",
    ),
    Command(
        "generate",
        "vllm_layerskip.commands.generate",
        "Answer a file of prompts, on one engine or, with Ray, on many.",
    ),
    Command(
        "self-chats",
        "vllm_layerskip.commands.self_chats",
        "Make chats out of nothing but a model, which asks and answers: data for its drafts.",
    ),
    Command(
        "example-model",
        "vllm_layerskip.commands.example_model",
        "Make a small instruct model to try LayerSkip with, out of the package index.",
    ),
)
