# SPDX-License-Identifier: Apache-2.0
"""Prompts for tuning the embedded checkpoint: text of modules that it never saw in training.

python examples/tuning/held_out_prompts.py 16 > prompts.jsonl
"""

from __future__ import annotations

import json
import sys

from vllm_layerskip.files.corpus import held_out_prompts, load_stdlib


def main() -> None:
    num_prompts = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    for module, text in held_out_prompts(load_stdlib(), num_prompts, max_chars=360):
        print(json.dumps({"category": module, "prompt": text}))


if __name__ == "__main__":
    main()
