# SPDX-License-Identifier: Apache-2.0
"""What is measured: the options that every mode of one table shares."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engines.command_line import positive_int
from benchmarks.engines.modes import Speculation
from benchmarks.engines.presets import PRESETS, length_for
from vllm_layerskip.commands.arguments import json_object
from vllm_layerskip.config.draft_vocab import read_draft_vocab
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.shapes import SHAPES, Shape
from vllm_layerskip.twins.kinds import CHOICES, NONE

ALL_LAYERS = "all"
"""``--exit-layer``: every layer drafts, which pays with a draft twin alone."""


class DecodeCell(NamedTuple):
    """What is measured at once."""

    prompt_len: int
    batch_size: int


@dataclass(frozen=True)
class Settings:
    """One table's settings; each field is an option of the same name."""

    shape: str | None = None
    model: str | None = None
    exit_layer: int = 0
    num_speculative_tokens: int = 0
    synthetic_acceptance_length: float | None = None
    draft_vocab: str | None = None
    draft_quantization: str = NONE
    schedule: list[list[int]] | None = None
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16, 32])
    prompt_lens: list[int] = field(default_factory=lambda: [128])
    output_len: int = 256
    repeats: int = 3
    prompts: str = "random"
    dtype: str = "bfloat16"
    device: str = "cuda"
    enforce_eager: bool = False
    engine_args: dict[str, Any] = field(default_factory=dict)
    round: int = 1
    """Which of a table's rounds; each has an engine of its own for every mode."""

    def to_argv(self) -> list[str]:
        """Options that make these settings again; ``--round`` is not one of every program."""
        argv: list[str] = []
        for option in fields(self):
            value, flag = getattr(self, option.name), f"--{option.name.replace('_', '-')}"
            if value is None or value is False or value == {} or option.name == "round":
                continue
            if value is True:
                argv.append(flag)
            elif option.name in _JSON_OPTIONS:
                argv += [flag, json.dumps(value)]
            elif isinstance(value, list):
                argv += [flag, *map(str, value)]
            else:
                argv += [flag, str(value)]
        return argv

    def identity(self) -> dict[str, Any]:
        """What a cell's numbers depend on, besides its mode, batch size and prompt length."""
        varying = ("batch_sizes", "prompt_lens")
        return {name: value for name, value in asdict(self).items() if name not in varying}

    def cells(self) -> list[DecodeCell]:
        """The table's cells in the order of measuring: small batches first."""
        sizes, lengths = sorted(set(self.batch_sizes)), dict.fromkeys(self.prompt_lens)
        return [DecodeCell(length, size) for length in lengths for size in sizes]

    def model_shape(self) -> Shape:
        """The model's sizes."""
        if self.model is None:
            return SHAPES[self.shape or "tiny"]
        return Shape.from_config(read_config(self.model))

    def speculation(self) -> Speculation:
        return Speculation(
            exit_layer=self.exit_layer,
            num_speculative_tokens=self.num_speculative_tokens,
            acceptance_length=self.synthetic_acceptance_length,
            draft_vocab=self.draft_vocab,
            draft_quantization=self.draft_quantization,
            schedule=self.schedule,
        )

    def with_num_speculative_tokens(self, num_drafts: int) -> Settings:
        """Another K; synthetic acceptance follows, with the same chance for each draft."""
        length = self.synthetic_acceptance_length
        if length is not None:
            length = length_for(length, self.num_speculative_tokens, num_drafts)
        return replace(self, num_speculative_tokens=num_drafts, synthetic_acceptance_length=length)

    @property
    def max_model_len(self) -> int:
        """Room for the last step's drafts too: near its end a request drafts less."""
        return max(self.prompt_lens) + self.output_len + self.num_speculative_tokens + 1

    @property
    def num_draft_vocab_ids(self) -> int | None:
        """How many ids the draft vocabulary (a size or a file) has.

        Raises:
            UserError: the file is no draft vocabulary of the model.
        """
        if self.draft_vocab is None:
            return None
        if self.draft_vocab.isdecimal():
            return int(self.draft_vocab)
        source = f"--draft-vocab={self.draft_vocab}"
        vocab_size = self.model_shape().vocab_size
        try:
            return len(read_draft_vocab(Path(self.draft_vocab), source, vocab_size))
        except ValueError as error:
            raise UserError(str(error)) from None


_JSON_OPTIONS = ("schedule", "engine_args")

_REHEARSAL: dict[str, Any] = {
    "batch_sizes": [1, 2],
    "prompt_lens": [16],
    "output_len": 16,
    "repeats": 1,
    "dtype": "float32",
    "enforce_eager": True,
}
"""``--tiny``: seconds instead of minutes; its speeds mean nothing."""


def read_config(model: str) -> dict[str, Any]:
    """A checkpoint's ``config.json``.

    Raises:
        UserError: ``model`` is no folder with one.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        raise UserError(f"--model={model} is no checkpoint folder: it holds no config.json.")
    return json.loads(path.read_text(encoding="utf-8"))


def add_arguments(parser: argparse.ArgumentParser, of_a_table: bool = False) -> None:
    """The options; ``settings_from`` fills in the defaults.

    Args:
        of_a_table: ``--num-speculative-tokens`` and ``--draft-quantization`` take several values.
    """
    model = parser.add_argument_group("model")
    _add_model_arguments(model)
    _add_draft_arguments(model, of_a_table)
    _add_load_arguments(parser.add_argument_group("load"))
    _add_engine_arguments(parser.add_argument_group("engine"))


def _add_model_arguments(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--preset", choices=sorted(PRESETS), help="Fills shape, E, K, acceptance.")
    what.add_argument("--shape", choices=sorted(SHAPES), help="Sizes, with dummy weights.")
    what.add_argument("--model", help="A checkpoint folder, with its real acceptance.")
    what.add_argument("--synthetic-acceptance-length", type=float)
    what.add_argument("--draft-vocab", help="File of token ids, or a number N: the first N ids.")
    what.add_argument("--schedule", type=_schedule, help="JSON: [[first, last batch size, K], …]")


def _add_draft_arguments(what: argparse._ArgumentGroup, of_a_table: bool) -> None:
    what.add_argument(
        "--exit-layer",
        type=exit_layer,
        metavar="E",
        help="E; default: preset's or checkpoint's. With draft quantization also: all",
    )
    several: dict[str, Any] = {"nargs": "+"} if of_a_table else {}
    what.add_argument("--num-speculative-tokens", type=int, metavar="K", help="K", **several)
    what.add_argument(
        "--draft-quantization",
        choices=CHOICES,
        help="Weights of the layers that draft, in mode layerskip.",
        **several,
    )


def exit_layer(text: str) -> int | str:
    """The type of ``--exit-layer``."""
    if text == ALL_LAYERS or (text.isdecimal() and int(text) > 0):
        return text if text == ALL_LAYERS else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1, or all")


def _schedule(text: str) -> list[list[int]]:
    """The type of ``--schedule``."""
    try:
        schedule = json.loads(text)
        if all(
            isinstance(number, int) for first, last, k in schedule for number in (first, last, k)
        ):
            return schedule
    except (ValueError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be JSON such as [[1, 8, 4], [9, 32, 0]]")


def _add_load_arguments(load: argparse._ArgumentGroup) -> None:
    default = Settings()
    load.add_argument("--batch-sizes", nargs="+", type=positive_int, help=f"{default.batch_sizes}")
    load.add_argument("--prompt-lens", nargs="+", type=positive_int, help=f"{default.prompt_lens}")
    load.add_argument("--output-len", type=positive_int, help=f"{default.output_len}")
    load.add_argument(
        "--repeats", type=positive_int, help=f"Runs of which the median counts: {default.repeats}"
    )
    load.add_argument("--prompts", help="random, python (held-out modules), or a JSON-lines file")


def _add_engine_arguments(engine: argparse._ArgumentGroup) -> None:
    engine.add_argument("--dtype", help=Settings.dtype)
    engine.add_argument("--device", choices=("cuda", "cpu"))
    engine.add_argument("--enforce-eager", action="store_true", default=None)
    engine.add_argument("--engine-args", type=json_object, help="JSON of further LLM() arguments.")
    engine.add_argument("--tiny", action="store_true", help="A rehearsal: tiny shape, few tokens.")


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings out of parsed options: an option beats the preset, which beats the defaults.

    Raises:
        UserError: E or K is named nowhere, or model and shape are given both.
    """
    given = {
        option.name: value
        for option in fields(Settings)
        if (value := getattr(args, option.name, None)) is not None
    }
    if "model" in given and {"shape", "preset"} & {k for k, v in vars(args).items() if v}:
        raise UserError("--model cannot go with --shape or --preset. Give one of them.")
    values: dict[str, Any] = dict(_REHEARSAL) if args.tiny else {}
    num_drafts = given.pop("num_speculative_tokens", None)
    every_layer = given.get("exit_layer") == ALL_LAYERS
    if every_layer:
        del given["exit_layer"]
    if "model" in given:
        values |= _from_checkpoint(given["model"])
    else:
        values |= _from_preset(args.preset or ("tiny" if args.tiny else None))
    settings = Settings(**values)
    if num_drafts is not None:
        if settings.num_speculative_tokens and "synthetic_acceptance_length" not in given:
            settings = settings.with_num_speculative_tokens(num_drafts)
        settings = replace(settings, num_speculative_tokens=num_drafts)
    settings = replace(settings, **given)
    if every_layer:
        settings = replace(settings, exit_layer=settings.model_shape().num_layers)
    if settings.exit_layer < 1 or settings.num_speculative_tokens < 1:
        raise UserError(
            f"--exit-layer={settings.exit_layer} and --num-speculative-tokens="
            f"{settings.num_speculative_tokens} must be at least 1. Give them, or a --preset "
            f"({', '.join(sorted(PRESETS))}), or a --model whose config.json has them."
        )
    if settings.model is None and settings.shape is None:
        raise UserError("Nothing to measure. Give --preset, --shape or --model.")
    return settings


def _from_preset(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    preset = PRESETS[name]
    return {
        "shape": preset.shape,
        "exit_layer": preset.exit_layer,
        "num_speculative_tokens": preset.num_speculative_tokens,
        "synthetic_acceptance_length": preset.acceptance_length,
        "draft_vocab": str(preset.draft_vocab) if preset.draft_vocab else None,
    }


def _from_checkpoint(model: str) -> dict[str, Any]:
    block = read_config(model).get("layerskip") or {}
    names = ("exit_layer", "num_speculative_tokens")
    return {"prompts": "python"} | {name: block[name] for name in names if name in block}
