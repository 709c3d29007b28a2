# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_layerskip.training --output DIR``: train and score the embedded checkpoint.

For other shapes, data and recipes there is ``vllm-layerskip train``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_layerskip.training.embedded_checkpoint import TrainingPlan, run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder of the checkpoint.")
    parser.add_argument(
        "--twin",
        action="store_true",
        help="Also train and score the twin: same data, steps and seed, no recipe.",
    )
    parser.add_argument(
        "--keep-checkpoint",
        action="store_true",
        help="Do not train: score the checkpoint that is in --output (and train the twin).",
    )
    args = parser.parse_args()
    run(TrainingPlan(), args.output, with_twin=args.twin, keep_checkpoint=args.keep_checkpoint)


if __name__ == "__main__":
    main()
