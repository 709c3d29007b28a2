# SPDX-License-Identifier: Apache-2.0
"""The limits of a setting before anything is run.

    python -m benchmarks.decode.limits --preset 8b

By the roofline of ``roofline.py``, for a GPU of ``hardware.py``.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.decode.report import markdown
from benchmarks.engines.modes import SYNTHETIC_MODES
from benchmarks.engines.settings import Settings, add_arguments, settings_from
from vllm_layerskip.measuring.hardware import GPUS
from vllm_layerskip.measuring.roofline import Decoding, Roofline, scheduled_drafts

MODES = ("plain", *SYNTHETIC_MODES, "early-exit")
HEADER = ("prompt", "batch", "plain tok/s", *(f"{mode} x" for mode in MODES[1:]))


def limits(settings: Settings, gpu: str) -> str:
    """A Markdown table: plain decoding's tokens/s, and the other modes' speed-ups over it."""
    roofline = Roofline(settings.model_shape(), GPUS[gpu], settings.dtype)
    body = []
    for prompt_len, batch_size in settings.cells():
        load = (batch_size, prompt_len + settings.output_len / 2)
        num_drafts = scheduled_drafts(
            settings.schedule, settings.num_speculative_tokens, batch_size
        )
        decoding = [
            Decoding(
                mode,
                settings.exit_layer,
                num_drafts,
                settings.with_num_speculative_tokens(num_drafts).synthetic_acceptance_length or 1.0,
                settings.num_draft_vocab_ids if mode.startswith("layerskip") else None,
            )
            for mode in SYNTHETIC_MODES
        ]
        decoding.append(Decoding("early-exit", settings.exit_layer))
        plain = roofline.tokens_per_s(Decoding("plain"), *load)
        speedups = (f"{roofline.speedup(mode, *load):.2f}" for mode in decoding)
        body.append([str(prompt_len), str(batch_size), f"{plain:.0f}", *speedups])
    return markdown(HEADER, body)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--num-speculative-tokens", type=int, help="K")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="NVIDIA H200")
    args = parser.parse_args()
    try:
        settings = settings_from(args)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(limits(settings, args.gpu) + "\n")


if __name__ == "__main__":
    main()
