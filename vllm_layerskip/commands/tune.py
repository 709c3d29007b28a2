# SPDX-License-Identifier: Apache-2.0
"""Choose the exit layer E, the drafts K and the batch-size schedule of a checkpoint.

From the prompts it predicts the speed of every (E, K): acceptance from one pass over the model's
own greedy answers, costs from a few measured engines (or, with --hardware, from a roofline). Then
it measures the best few in vLLM, and writes what it chose into the checkpoint's config.json,
where `exit_layer: "auto"` finds it. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.commands.arguments import json_object
from vllm_layerskip.errors import UserError

if TYPE_CHECKING:
    from vllm_layerskip.evaluation.agreement import Agreement
    from vllm_layerskip.tuning.cells import Row
    from vllm_layerskip.tuning.costs import RooflineCosts
    from vllm_layerskip.tuning.measure import CellJob
    from vllm_layerskip.tuning.ray_jobs import Cluster
    from vllm_layerskip.tuning.tune import Grid, Result

_DEFAULT_MEASURED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Folder or name of the checkpoint.")
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help="One prompt a line; of a .jsonl file each line is a string, or an object with "
        "'prompt', 'text', or 'turns' (Spec-Bench's question.jsonl).",
    )
    grid = parser.add_argument_group("what may be chosen")
    grid.add_argument(
        "--exit-layers", metavar="E", help="Such as 2-8 or 2,4,8. Default: all, 1 to L - 1."
    )
    grid.add_argument(
        "--num-speculative-tokens", metavar="K", default="1-8", help="Such as 1-12. Default: 1-8."
    )
    grid.add_argument(
        "--batch-sizes",
        metavar="B",
        default="1",
        help="Such as 1,8,32; the last one is the largest batch that is served. Default: 1.",
    )
    load = parser.add_argument_group("prompts and answers")
    load.add_argument("--num-prompts", type=int, default=32, metavar="N", help="Default: 32.")
    load.add_argument(
        "--max-prompt-tokens", type=int, default=1024, metavar="N",
        help="Longer prompts are left out. Default: 1024.",
    )  # fmt: skip
    load.add_argument(
        "--max-tokens", type=int, default=128, metavar="N",
        help="Of an answer; it ends earlier where the model ends it. Default: 128.",
    )  # fmt: skip
    load.add_argument(
        "--chat", action="store_true", help="Wrap prompts in the tokenizer's chat template."
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", default=None, help="Default: auto; float32 on a CPU.")
    engine.add_argument(
        "--device", choices=("cuda", "cpu"), help="Default: cuda if there is a GPU."
    )
    engine.add_argument("--draft-vocab", metavar="FILE", help="As `vllm serve --draft-vocab`.")
    engine.add_argument("--enforce-eager", action="store_true", help="No compilation, no graphs.")
    engine.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON",
        help='Further arguments of vLLM\'s LLM, such as \'{"tensor_parallel_size": 2}\'.',
    )  # fmt: skip
    work = parser.add_argument_group("work")
    work.add_argument(
        "--num-measured", type=_num_measured, metavar="N",
        help="Cells (E, K) to measure besides those that costs are fitted to; 'all' sweeps the "
        f"whole grid, 0 only predicts. Default: {_DEFAULT_MEASURED}; 0 with --hardware.",
    )  # fmt: skip
    work.add_argument(
        "--hardware", metavar="GPU",
        help="Take costs from this GPU's roofline (h100, h200, a100, l4...) instead of measuring.",
    )  # fmt: skip
    work.add_argument(
        "--repeats", type=int, default=3, metavar="N",
        help="Runs of each cell, of which the median counts. Default: 3.",
    )  # fmt: skip
    work.add_argument(
        "--rounds", type=int, default=1, metavar="N",
        help="Measure each cell N times, all cells in turn, and take its fastest round: for "
        "machines that others share. Default: 1.",
    )  # fmt: skip
    work.add_argument(
        "--cells-per-process", type=int, default=1, metavar="N",
        help="Engines that one process starts in turn. Default: 1, which leaves nothing behind.",
    )  # fmt: skip
    work.add_argument(
        "--generator", choices=("vllm", "transformers"),
        help="What writes the greedy answers. Default: vllm; transformers with --hardware.",
    )  # fmt: skip
    work.add_argument(
        "--agreement", type=Path, metavar="FILE",
        help="Take the acceptance statistics from an earlier run's agreement.npz; the model's "
        "weights are not needed then, if nothing is measured.",
    )  # fmt: skip
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ray", action="store_true",
        help="Measure on a Ray cluster, as many cells at once as it has GPUs for; on CPUs one a "
        "node.",
    )  # fmt: skip
    cluster.add_argument(
        "--ray-address", metavar="ADDRESS",
        help="The cluster, such as auto; implies --ray. Default: RAY_ADDRESS, or this machine.",
    )  # fmt: skip
    cluster.add_argument(
        "--accelerator-type", metavar="TYPE",
        help="Ray's name of the GPUs to use, such as H100, if the cluster has several types.",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--results", type=Path, metavar="FOLDER",
        help="Statistics, measured cells, report, map, logs. Default: tune-MODEL.",
    )  # fmt: skip
    output.add_argument(
        "--map", type=Path, metavar="FILE", help="The E x K map. Default: map.png in --results."
    )
    where = output.add_mutually_exclusive_group()
    where.add_argument(
        "--output", type=Path, metavar="FILE",
        help="Write the changed config.json here. Default: into the checkpoint's folder, keeping "
        "what was there as config.json.before-tune.",
    )  # fmt: skip
    where.add_argument("--dry-run", action="store_true", help="Change no config.json.")


def run(args: argparse.Namespace) -> None:
    from vllm_layerskip.tuning.report import differing_outputs, text_report

    plan = make_plan(args)
    result = execute(plan)
    print(text_report(result))
    if plan.num_too_long:
        print(f"\n{plan.num_too_long} prompts were left out: longer than --max-prompt-tokens.")
    different = differing_outputs(result.rows)
    if different and plan.job.engine.dtype == "float32":
        cells = ", ".join(f"E={r.exit_layer} K={r.num_speculative_tokens}" for r in different)
        print(f"\nWarning: in float32 outputs must equal plain decoding's, and differ at {cells}.")
    _write(plan, result)


@dataclass(frozen=True)
class Plan:
    """A checked command line."""

    model: str
    config: Mapping[str, Any]
    grid: Grid
    job: CellJob
    """Without cells: engine, load and settings of every cell."""
    identity: Mapping[str, Any]
    num_too_long: int
    num_measured: int
    rounds: int
    roofline: RooflineCosts | None
    cells_per_process: int
    cluster: Cluster | None
    generator: str
    draft_vocab: tuple[int, ...] | None
    agreement: Path | None
    results: Path
    map: Path
    config_output: Path | None
    """None: config.json stays as it is."""
    into_checkpoint: bool


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that can be checked before a model is loaded.

    Raises:
        UserError: an option is wrong; the message names it, its value and what to do.
    """
    from vllm_layerskip.measuring.hardware import gpu_info
    from vllm_layerskip.tuning.cells import settings_digest
    from vllm_layerskip.tuning.checkpoint_block import check_writable, read_config
    from vllm_layerskip.tuning.measure import CellJob, Load
    from vllm_layerskip.tuning.prompts import encode_prompts, read_prompts, spread
    from vllm_layerskip.tuning.tune import Grid

    for option in (
        "num_prompts",
        "max_prompt_tokens",
        "max_tokens",
        "repeats",
        "rounds",
        "cells_per_process",
    ):
        if getattr(args, option) < 1:
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(args, option)} must be an integer of at least 1.")
    config = read_config(args.model)
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 2:
        raise UserError(
            f"--model {args.model}: its config.json has num_hidden_layers={num_layers!r}; a "
            "decoder of at least 2 layers is needed. Give another checkpoint."
        )
    grid = Grid(
        exit_layers=_numbers(
            "--exit-layers", args.exit_layers or f"1-{num_layers - 1}", num_layers - 1
        ),
        num_speculative_tokens=_numbers("--num-speculative-tokens", args.num_speculative_tokens),
        batch_sizes=_numbers("--batch-sizes", args.batch_sizes),
    )
    if max(grid.num_speculative_tokens) + 2 > args.max_tokens:
        raise UserError(
            f"--max-tokens {args.max_tokens} is too small for one step of "
            f"{max(grid.num_speculative_tokens)} drafts. Raise it to "
            f"{max(grid.num_speculative_tokens) + 2} or more, or lower --num-speculative-tokens."
        )
    prompts = read_prompts(args.prompts)
    folder = Path(args.model)
    config_output = args.output
    if config_output is None and not args.dry_run and folder.is_dir():
        config_output = folder / "config.json"
    if config_output is not None:
        check_writable(config_output, "--output" if args.output else f"--model {args.model}")
    results = args.results or Path(
        f"tune-{folder.resolve().name if folder.is_dir() else folder.name}"
    )
    _make_folder(results)
    drawing = args.map or results / "map.png"
    if drawing.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--map {drawing} must end with .png, .svg or .pdf.")
    check_writable(drawing, "--map")
    cluster = _cluster(args)
    device = cluster.device if cluster else args.device or ("cuda" if gpu_info() else "cpu")
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")
    roofline = _roofline(args.hardware, config, dtype) if args.hardware else None
    encoded = encode_prompts(
        spread(prompts, args.num_prompts), args.model, args.max_prompt_tokens, args.chat
    )
    draft_vocab = _draft_vocab(args.draft_vocab, args.model, config)
    longest = max(map(len, encoded.token_ids))
    needed = longest + args.max_tokens + max(grid.num_speculative_tokens) + 1
    engine = _engine(args, config, device, dtype, needed, max(grid.batch_sizes))
    load = Load(
        prompts=encoded.token_ids,
        max_tokens=args.max_tokens,
        stop_token_ids=encoded.stop_token_ids,
        batch_sizes=grid.batch_sizes,
        repeats=args.repeats,
    )
    machine = None if cluster is None else cluster.machine
    identity = _identity(config, asdict(engine), asdict(load), draft_vocab, machine)
    num_measured = args.num_measured
    if num_measured is None:
        num_measured = 0 if roofline else _DEFAULT_MEASURED
    if roofline is not None:
        context = sum(map(len, encoded.token_ids)) / len(encoded.token_ids) + args.max_tokens / 2
        roofline = _with_context(roofline, context, draft_vocab)
    return Plan(
        model=args.model,
        config=config,
        grid=grid,
        job=CellJob((), engine, load, settings_digest(identity)),
        identity=identity,
        num_too_long=encoded.num_too_long,
        num_measured=num_measured,
        rounds=args.rounds,
        roofline=roofline,
        cells_per_process=args.cells_per_process,
        cluster=cluster,
        generator=args.generator or ("transformers" if roofline else "vllm"),
        draft_vocab=draft_vocab,
        agreement=args.agreement,
        results=results,
        map=drawing,
        config_output=config_output,
        into_checkpoint=config_output is not None and args.output is None,
    )


def _cluster(args: argparse.Namespace) -> Cluster | None:
    from vllm_layerskip.tuning import ray_jobs

    if not args.ray and args.ray_address is None:
        if args.accelerator_type is not None:
            raise UserError(f"--accelerator-type {args.accelerator_type} needs --ray. Add it.")
        return None
    return ray_jobs.connect(args.ray_address, args.device, args.accelerator_type)


def execute(plan: Plan) -> Result:
    """Predict, measure, choose; results go to the plan's folder as they come."""
    from dataclasses import replace

    from vllm_layerskip.tuning.jobs import measure_in_processes
    from vllm_layerskip.tuning.ray_jobs import measure_on_cluster
    from vllm_layerskip.tuning.tune import CELLS_FILE, MeasuredCells, tune

    agreement = _agreement(plan)
    measured = MeasuredCells(
        plan.results / CELLS_FILE, plan.job.settings, plan.grid.batch_sizes, plan.rounds
    )

    def measure_cells(cells: Sequence[tuple[int, int]]) -> Iterator[Row]:
        job = replace(plan.job, cells=tuple(cells))
        if plan.cluster is None:
            rows = measure_in_processes(job, plan.cells_per_process, plan.results / "logs")
        else:
            rows = measure_on_cluster(job, plan.cells_per_process, plan.cluster, plan.identity)
        return _progress(rows, len(cells) * len(plan.grid.batch_sizes))

    return tune(plan.grid, agreement, measured, measure_cells, plan.num_measured, plan.roofline)


def _agreement(plan: Plan) -> Agreement:
    from vllm_layerskip.evaluation.agreement import Agreement
    from vllm_layerskip.tuning.jobs import agreement_in_process
    from vllm_layerskip.tuning.ray_jobs import agreement_on_cluster

    path = plan.agreement or plan.results / "agreement.npz"
    if plan.agreement is not None or path.exists():
        try:
            agreement, identity = Agreement.load(path)
        except UserError:
            if plan.agreement is not None:
                raise
        else:
            missing = set(plan.grid.exit_layers) - set(agreement.exit_layers)
            if plan.agreement is not None and missing:
                raise UserError(
                    f"--agreement {path} has no exit layers {sorted(missing)}; it has "
                    f"{list(agreement.exit_layers)}. Give --exit-layers, or leave it out."
                )
            if plan.agreement is not None or (identity == plan.job.settings and not missing):
                return agreement
    _say("Reading every exit's predictions along the model's greedy answers...")
    asked = (plan.job, plan.grid.exit_layers, plan.draft_vocab, plan.generator, path)
    if plan.cluster is not None:
        return agreement_on_cluster(*asked, plan.cluster, plan.identity)
    return agreement_in_process(*asked, plan.results / "logs")


def _write(plan: Plan, result: Result) -> None:
    from vllm_layerskip.measuring.provenance import provenance
    from vllm_layerskip.tuning.checkpoint_block import tuned_block, write_config
    from vllm_layerskip.tuning.plot import draw_map
    from vllm_layerskip.tuning.report import serve_line, to_dict

    facts = provenance()
    report = plan.results / "report.json"
    report.write_text(
        json.dumps(to_dict(result, plan.identity, facts), indent=1) + "\n", encoding="utf-8"
    )
    draw_map(result, plan.map)
    print(f"\nReport: {report}. Map: {plan.map}.")
    engine = plan.job.engine
    tuning = {
        "basis": "measured" if result.measured_speedups else "predicted",
        "device": (facts["gpu"] or {}).get("name") or facts["cpu"]["model"],
        "dtype": engine.dtype,
        "speedups": {str(size): round(s, 3) for size, s in result.choice.speedups.items()},
        "versions": facts["versions"],
        "time": facts["time"],
    }
    block = tuned_block(plan.config.get("layerskip"), result.choice, tuning)
    if plan.config_output is None:
        print(f"No config.json was changed. The block for it:\n{json.dumps({'layerskip': block})}")
    else:
        backup = write_config(
            plan.config_output, {**plan.config, "layerskip": block}, backup=plan.into_checkpoint
        )
        kept = f"; what was there is kept as {backup.name}" if backup else ""
        print(f"Wrote {plan.config_output}{kept}.")
    command = serve_line(
        plan.model,
        result.choice,
        plan.into_checkpoint,
        engine.dtype,
        engine.enforce_eager,
        engine.draft_vocab,
    )
    print(f"Serve with:\n  {command}")


def _identity(
    config: Mapping[str, Any],
    engine: Mapping[str, Any],
    load: Mapping[str, Any],
    draft_vocab: Iterable[int] | None,
    machine: str | None,
) -> dict[str, Any]:
    """Everything that a measured cell depends on, besides its E, K and batch size.

    The checkpoint's block is left out: cells state their E and K.
    """
    from vllm_layerskip.measuring.hardware import gpu_info
    from vllm_layerskip.measuring.provenance import code_digest, cpu_model, versions

    digest = hashlib.sha256(json.dumps([load["prompts"], draft_vocab]).encode()).hexdigest()[:12]
    return {
        "config": {
            k: v for k, v in config.items() if k not in ("layerskip", "transformers_version")
        },
        "engine": dict(engine),
        "load": {k: v for k, v in load.items() if k not in ("prompts", "batch_sizes")},
        "max_num_seqs": max(load["batch_sizes"]),
        "prompts": digest,
        "weights": _weights(Path(engine["model"])),
        "machine": machine or (gpu_info() or {}).get("name") or cpu_model(),
        "versions": versions(),
        "code": code_digest(),
    }


def _weights(folder: Path) -> list[list[Any]] | None:
    """Names, sizes and times of a folder's weights: a retrained checkpoint is another one."""
    if not folder.is_dir():
        return None
    files = (path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _engine(
    args: argparse.Namespace,
    config: Mapping[str, Any],
    device: str,
    dtype: str,
    num_needed: int,
    batch_size: int,
) -> Any:
    from vllm_layerskip.measuring.shapes import Shape
    from vllm_layerskip.tuning.measure import EngineSettings

    longest = config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) else sys.maxsize
    if num_needed > longest:
        raise UserError(
            f"--max-tokens {args.max_tokens}: with the longest prompt and its drafts that is "
            f"{num_needed} tokens, and the model takes {longest}. Lower --max-tokens or "
            "--max-prompt-tokens."
        )
    # Rounded, so that another range of K does not make other settings of it.
    num_needed = min(-(-num_needed // 64) * 64, longest)
    kv_bytes = None
    if device == "cpu":
        shape = Shape.from_config(config)
        values = batch_size * num_needed * shape.num_layers * shape.kv_values_per_layer
        # Room for all requests and as much again for the prompts of the next ones.
        kv_bytes = max(64 << 20, 2 * 4 * values)
    return EngineSettings(
        model=args.model,
        dtype=dtype,
        device=device,
        max_model_len=num_needed,
        enforce_eager=args.enforce_eager,
        draft_vocab=args.draft_vocab,
        kv_cache_memory_bytes=kv_bytes,
        engine_args=args.engine_args,
    )


def _draft_vocab(
    request: str | None, model: str, config: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """Token ids that drafts may be, as an engine would read them."""
    from vllm_layerskip.config.draft_vocab import read_draft_vocab
    from vllm_layerskip.config.options import resolve_options

    block = config.get("layerskip")
    name = block.get("draft_vocab") if isinstance(block, dict) else None
    asked = {"method": "layerskip", "exit_layer": 1, "num_speculative_tokens": 1}
    if request is not None:
        asked["draft_vocab"] = request
    try:
        file = resolve_options(asked, 2, {"draft_vocab": name} if name else None).draft_vocab
        if file is None:
            return None
        path = Path(model, file.path) if file.in_checkpoint else Path(file.path).expanduser()
        vocab = read_draft_vocab(path, file.source, config["vocab_size"])
    except ValueError as error:
        raise UserError(f"--draft-vocab: {error}") from None
    return tuple(int(token) for token in vocab.token_ids)


def _roofline(hardware: str, config: Mapping[str, Any], dtype: str) -> RooflineCosts:
    from vllm_layerskip.measuring.hardware import GPUS, find_by_part
    from vllm_layerskip.measuring.roofline import NUM_BYTES, Roofline
    from vllm_layerskip.measuring.shapes import Shape
    from vllm_layerskip.tuning.costs import RooflineCosts

    found = find_by_part(hardware)
    if found is None:
        raise UserError(
            f"--hardware {hardware}: no such GPU is known. Known ones are {', '.join(GPUS)}; a "
            "word of the name is enough."
        )
    stated = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    width = stated if dtype == "auto" else dtype
    if width not in NUM_BYTES:
        raise UserError(f"--dtype {width}: the roofline knows {', '.join(NUM_BYTES)}. Give one.")
    return RooflineCosts(Roofline(Shape.from_config(config), found[1], width), context=0)


def _with_context(
    costs: RooflineCosts, context: float, draft_vocab: Sequence[int] | None
) -> RooflineCosts:
    from dataclasses import replace

    num_ids = None if draft_vocab is None else len(draft_vocab)
    return replace(costs, context=context, num_draft_vocab_ids=num_ids)


def _numbers(option: str, text: str, largest: int | None = None) -> tuple[int, ...]:
    """``2-4,8`` as numbers, ascending."""
    numbers: set[int] = set()
    valid = f"integers from 1 to {largest}" if largest else "integers of at least 1"
    wrong = f"{option} {text} must be {valid}, such as 2-4 or 1,2,8."
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            begin = int(first)
            end = int(last) if dash else begin
        except ValueError:
            raise UserError(wrong) from None
        if not 1 <= begin <= end <= (largest or end):
            raise UserError(wrong)
        numbers.update(range(begin, end + 1))
    return tuple(sorted(numbers))


def _num_measured(text: str) -> int:
    if text == "all":
        from vllm_layerskip.tuning.tune import ALL

        return ALL
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of cells, or 'all'")
    return int(text)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {path}: {error.strerror}. Choose another folder.") from None


def _progress(rows: Iterable[Row], num_rows: int) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        name = f"E={row.exit_layer} K={row.num_speculative_tokens}" if row.exit_layer else "plain"
        _say(
            f"[{number}/{num_rows}] {name}, batch {row.batch_size}: "
            f"{row.tokens_per_s:.1f} tokens/s, {row.step_ms:.2f} ms a step"
        )
        yield row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
