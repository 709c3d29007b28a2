# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_layerskip.training --output DIR``: train and score a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from vllm_layerskip.training.embedded_checkpoint import TrainingPlan, run
from vllm_layerskip.training.recipe import Recipe


def main() -> None:
    plan = TrainingPlan()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder of the checkpoint.")
    parser.add_argument("--num-steps", type=int, default=plan.num_steps)
    parser.add_argument("--batch-size", type=int, default=plan.batch_size)
    parser.add_argument("--learning-rate", type=float, default=plan.learning_rate)
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument(
        "--max-layer-dropout", type=float, default=plan.recipe.max_layer_dropout, help="p_max"
    )
    parser.add_argument(
        "--exit-loss-scale", type=float, default=plan.recipe.exit_loss_scale, help="e_scale"
    )
    parser.add_argument(
        "--exit-loss-profile", choices=("sum", "uniform"), default=plan.recipe.exit_loss_profile
    )
    parser.add_argument(
        "--curriculum", choices=("rotational", "gradual"), default=plan.recipe.curriculum
    )
    parser.add_argument("--rotation", type=int, default=plan.recipe.rotation, help="R")
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
    recipe = Recipe(
        max_layer_dropout=args.max_layer_dropout,
        exit_loss_scale=args.exit_loss_scale,
        exit_loss_profile=args.exit_loss_profile,
        curriculum=args.curriculum,
        rotation=args.rotation,
    )
    plan = replace(
        plan,
        num_steps=args.num_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        recipe=recipe,
    )
    run(plan, args.output, with_twin=args.twin, keep_checkpoint=args.keep_checkpoint)


if __name__ == "__main__":
    main()
