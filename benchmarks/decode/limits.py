# SPDX-License-Identifier: Apache-2.0
"""The limits of a setting before anything is run.

    python -m benchmarks.decode.limits --preset 8b

They come from the roofline of ``vllm_layerskip/measuring/roofline.py``, for a GPU that
``vllm_layerskip/measuring/hardware.py`` lists.
"""

from __future__ import annotations

import sys

from benchmarks.engines.command_line import make_parser, mistakes_reported
from benchmarks.engines.markdown import markdown
from benchmarks.engines.modes import SYNTHETIC_MODES
from benchmarks.engines.settings import Settings, add_arguments, settings_from
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.hardware import GPUS
from vllm_layerskip.measuring.roofline import NUM_BYTES, Decoding, Roofline, scheduled_drafts
from vllm_layerskip.twins.kinds import NONE

MODES = ("plain", *SYNTHETIC_MODES, "early-exit")
HEADER = ("prompt", "batch", "plain tok/s", *(f"{mode} x" for mode in MODES[1:]))


def limits(settings: Settings, gpu: str) -> str:
    """A Markdown table: plain decoding's tokens/s, and the other modes' speed-ups over it.

    Raises:
        UserError: the bytes of the dtype are unknown.
    """
    if settings.dtype not in NUM_BYTES:
        raise UserError(f"--dtype={settings.dtype} must be one of {', '.join(NUM_BYTES)}.")
    roofline = Roofline(settings.model_shape(), GPUS[gpu], settings.dtype)
    body = []
    for prompt_len, batch_size in settings.cells():
        batch = (batch_size, prompt_len + settings.output_len / 2)
        num_drafts = scheduled_drafts(
            settings.schedule, settings.num_speculative_tokens, batch_size
        )
        decoding = [_decoding(mode, settings, num_drafts) for mode in SYNTHETIC_MODES]
        decoding.append(Decoding("early-exit", settings.exit_layer))
        plain = roofline.tokens_per_s(Decoding("plain"), *batch)
        speedups = (f"{roofline.speedup(mode, *batch):.2f}" for mode in decoding)
        body.append([str(prompt_len), str(batch_size), f"{plain:.0f}", *speedups])
    return markdown(HEADER, body)


def _decoding(mode: str, settings: Settings, num_drafts: int) -> Decoding:
    """A mode of synthetic acceptance with ``num_drafts`` drafts."""
    length = settings.with_num_speculative_tokens(num_drafts).synthetic_acceptance_length
    return Decoding(
        mode,
        settings.exit_layer,
        num_drafts,
        length or 1.0,
        settings.num_draft_vocab_ids if mode.startswith("layerskip") else None,
        settings.draft_quantization if mode == "layerskip" else NONE,
    )


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="NVIDIA H200")
    args = parser.parse_args()
    with mistakes_reported(parser):
        sys.stdout.write(limits(settings_from(args), args.gpu) + "\n")


if __name__ == "__main__":
    main()
