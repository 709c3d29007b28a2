# SPDX-License-Identifier: Apache-2.0
"""Choose the exit layer E, the drafts K and the batch-size schedule of a checkpoint.

From the prompts it predicts the speed of every (E, K): acceptance from one pass over the model's
own greedy answers, costs from a few measured engines (or, with --hardware, from a roofline). Then
it measures the best few in vLLM, and writes what it chose into the checkpoint's config.json,
where `exit_layer: "auto"` finds it. A run that was interrupted goes on where it was.

With --draft-quantization and --draft-adapter it also chooses whose weights draft. A model that was
not trained for early exit: --exit-layers all --draft-quantization int4 int8 fp8.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_layerskip.commands.arguments import add_dtype_and_device, checkpoint, engine_args
from vllm_layerskip.errors import UserError, needs_extra
from vllm_layerskip.tuning.settings import (
    ALL,
    DEFAULT_MEASURED,
    EngineRequest,
    GridSettings,
    MeasuringSettings,
    OutputSettings,
    PromptSettings,
    RaySettings,
    TuneSettings,
)
from vllm_layerskip.twins.kinds import CHOICES

if TYPE_CHECKING:
    from vllm_layerskip.tuning.plan import TuningPlan
    from vllm_layerskip.tuning.tune import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=checkpoint, required=True, help="Folder or name of the checkpoint."
    )
    parser.add_argument(
        "--prompts",
        required=True,
        nargs="+",
        metavar="FILE",
        help="Files, folders or patterns. Of .jsonl, .json and .parquet files each record is a "
        "string, or has 'prompt', 'text', 'messages' (a chat) or 'turns' (Spec-Bench's "
        "question.jsonl); of a .txt file each line is a prompt.",
    )
    parser.add_argument(
        "--text-field", metavar="NAME", help="Where a record has its text, if not as above."
    )
    _add_grid(parser.add_argument_group("what may be chosen"))
    _add_prompts(parser.add_argument_group("prompts and answers"))
    _add_engine(parser.add_argument_group("engine"))
    work = parser.add_argument_group("work")
    _add_measuring(work)
    _add_sources(work)
    _add_cluster(parser.add_argument_group("cluster"))
    _add_output(parser.add_argument_group("output"))


def _add_grid(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--exit-layers", metavar="E",
        help="Such as 2-8 or 2,4,8; 'all' is L, with --draft-quantization. Default: 1 to L - 1, "
        "and L with --draft-quantization.",
    )  # fmt: skip
    group.add_argument(
        "--num-speculative-tokens", metavar="K", default=GridSettings.num_speculative_tokens,
        help="Such as 1-12. Default: %(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--batch-sizes", metavar="B", default=GridSettings.batch_sizes,
        help="Such as 1,8,32; the last one is the largest batch that is served. Default: "
        "%(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--draft-quantization", nargs="+", choices=CHOICES, metavar="KIND",
        default=list(GridSettings.draft_quantizations),
        help=f"Numbers that drafts may compute with: any of {', '.join(CHOICES)}. Default: none.",
    )  # fmt: skip
    group.add_argument(
        "--draft-adapter", nargs="+", metavar="PATH", default=list(GridSettings.draft_adapters),
        help="Folders of adapters for the layers that draft; 'none' among them for drafts without "
        "one. Default: none.",
    )  # fmt: skip


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num-prompts", type=int, default=PromptSettings.num_prompts, metavar="N",
        help="Default: %(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--max-prompt-tokens", type=int, default=PromptSettings.max_prompt_tokens, metavar="N",
        help="Longer prompts are left out. Default: %(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--max-tokens", type=int, default=PromptSettings.max_tokens, metavar="N",
        help="Of an answer; it ends earlier where the model ends it. Default: %(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--chat", action="store_true", help="Wrap prompts in the tokenizer's chat template."
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    add_dtype_and_device(group)
    group.add_argument("--draft-vocab", metavar="FILE", help="As `vllm serve --draft-vocab`.")
    group.add_argument("--enforce-eager", action="store_true", help="No compilation, no graphs.")
    group.add_argument(
        "--engine-args", type=engine_args, default={}, metavar="JSON",
        help='Further arguments of vLLM\'s LLM, such as \'{"tensor_parallel_size": 2}\'.',
    )  # fmt: skip


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num-measured", type=_num_measured, metavar="N",
        help="Cells (E, K) to measure besides those that costs are fitted to; 'all' sweeps the "
        f"whole grid, 0 only predicts. Default: {DEFAULT_MEASURED}; 0 with --hardware.",
    )  # fmt: skip
    group.add_argument(
        "--hardware", metavar="GPU",
        help="Take costs from this GPU's roofline (h100, h200, a100, l4...) instead of measuring.",
    )  # fmt: skip
    group.add_argument(
        "--repeats", type=int, default=MeasuringSettings.repeats, metavar="N",
        help="Runs of each cell, of which the median counts. Default: %(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--rounds", type=int, default=MeasuringSettings.rounds, metavar="N",
        help="Measure each cell N times, all cells in turn, and take its fastest round: for "
        "machines that others share. Default: %(default)s.",
    )  # fmt: skip
    group.add_argument(
        "--cells-per-process", type=int, default=MeasuringSettings.cells_per_process, metavar="N",
        help="Engines that one process starts in turn. Default: %(default)s, which leaves nothing "
        "behind.",
    )  # fmt: skip


def _add_sources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--generator", choices=("vllm", "transformers"),
        help="What writes the greedy answers. Default: vllm; transformers with --hardware.",
    )  # fmt: skip
    group.add_argument(
        "--agreement", type=Path, metavar="FILE",
        help="Take the acceptance statistics from an earlier run's agreement.npz; the model's "
        "weights are not needed then, if nothing is measured.",
    )  # fmt: skip


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ray", action="store_true",
        help="Measure on a Ray cluster, as many cells at once as it has GPUs for; on CPUs one a "
        "node.",
    )  # fmt: skip
    group.add_argument(
        "--ray-address", metavar="ADDRESS",
        help="The cluster, such as auto; implies --ray. Default: RAY_ADDRESS, or this machine.",
    )  # fmt: skip
    group.add_argument(
        "--accelerator-type", metavar="TYPE",
        help="Ray's name of the GPUs to use, such as H100, if the cluster has several types.",
    )  # fmt: skip


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--results", type=Path, metavar="FOLDER",
        help="Statistics, measured cells, report, map, logs. Default: tune-MODEL.",
    )  # fmt: skip
    group.add_argument(
        "--map", type=Path, metavar="FILE", help="The E x K map. Default: map.png in --results."
    )
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--output", type=Path, metavar="FILE",
        help="Write the changed config.json here. Default: into the checkpoint's folder, keeping "
        "what was there as config.json.before-tune.",
    )  # fmt: skip
    where.add_argument("--dry-run", action="store_true", help="Change no config.json.")


def _num_measured(text: str) -> int:
    if text == "all":
        return ALL
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of cells, or 'all'")
    return int(text)


def run(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    with needs_extra("train"):
        from vllm_layerskip.tuning.plan import make_plan
        from vllm_layerskip.tuning.report import text_report
        from vllm_layerskip.tuning.run import execute
    plan = make_plan(settings)
    _warn_of_references(plan)
    result = execute(plan, _say)
    print(text_report(result))
    _print_warnings(plan, result)
    _write(plan, result)


def settings_of(args: argparse.Namespace) -> TuneSettings:
    """What a command line asks for.

    Raises:
        UserError: --accelerator-type without a cluster.
    """
    return TuneSettings(
        model=args.model,
        prompts=PromptSettings(
            paths=tuple(args.prompts),
            text_field=args.text_field,
            num_prompts=args.num_prompts,
            max_prompt_tokens=args.max_prompt_tokens,
            max_tokens=args.max_tokens,
            chat=args.chat,
        ),
        grid=GridSettings(
            exit_layers=args.exit_layers,
            num_speculative_tokens=args.num_speculative_tokens,
            batch_sizes=args.batch_sizes,
            draft_quantizations=tuple(args.draft_quantization),
            draft_adapters=tuple(args.draft_adapter),
        ),
        engine=EngineRequest(
            dtype=args.dtype,
            device=args.device,
            draft_vocab=args.draft_vocab,
            enforce_eager=args.enforce_eager,
            engine_args=args.engine_args,
        ),
        measuring=MeasuringSettings(
            num_measured=args.num_measured,
            hardware=args.hardware,
            repeats=args.repeats,
            rounds=args.rounds,
            cells_per_process=args.cells_per_process,
            generator=args.generator,
            agreement=args.agreement,
        ),
        ray=_ray_settings(args),
        output=OutputSettings(args.results, args.map, args.output, args.dry_run),
    )


def _ray_settings(args: argparse.Namespace) -> RaySettings | None:
    if args.ray or args.ray_address is not None:
        return RaySettings(args.ray_address, args.accelerator_type)
    if args.accelerator_type is not None:
        raise UserError(f"--accelerator-type {args.accelerator_type} needs --ray. Add it.")
    return None


def _warn_of_references(plan: TuningPlan) -> None:
    """Say before anything is measured that times of float32 say nothing of a twin."""
    if plan.engine.dtype == "float32" and any(draft.may_exit_last for draft in plan.grids):
        _say(
            "Warning: in float32 a draft of fewer bits is a reference that costs what full width "
            "costs. Give --dtype bfloat16 to choose by speed."
        )


def _print_warnings(plan: TuningPlan, result: Result) -> None:
    from vllm_layerskip.tuning.report import differing_outputs

    if plan.num_too_long:
        print(f"\n{plan.num_too_long} prompts were left out: longer than --max-prompt-tokens.")
    different = differing_outputs(result.measurements)
    if different and plan.engine.dtype == "float32":
        cells = ", ".join(str(found.draft_cell) for found in different)
        print(f"\nWarning: in float32 outputs must equal plain decoding's, and differ at {cells}.")


def _write(plan: TuningPlan, result: Result) -> None:
    from vllm_layerskip.measuring.provenance import provenance
    from vllm_layerskip.tuning.report import serve_line
    from vllm_layerskip.tuning.write import chosen_block, write_block, write_report

    facts, outputs = provenance(), plan.outputs
    write_report(plan, result, facts)
    print(f"\nReport: {outputs.report}. Map: {outputs.map}.")
    block = chosen_block(plan, result, facts)
    if outputs.config is None:
        print(f"No config.json was changed. The block for it:\n{json.dumps({'layerskip': block})}")
    else:
        backup = write_block(plan, outputs.config, block)
        kept = f"; what was there is kept as {backup.name}" if backup else ""
        print(f"Wrote {outputs.config}{kept}.")
    written = outputs.into_checkpoint
    counts = block if written else plan.config.get("layerskip") or {}
    print(f"Serve with:\n  {serve_line(plan.engine, result.choice, written, counts)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
