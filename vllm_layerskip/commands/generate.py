# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts: JSON lines or Parquet in, JSON lines or Parquet out.

A row has `prompt`, `messages` (a chat) or `prompt_token_ids`, optionally `id` and
`sampling_params`; other columns are handed through. Output is in the order of the input. A row that
cannot be served gets an `error` and no answer. A run that was interrupted goes on where it was:
give the same command again. With --num-replicas above 1, Ray Data runs that many engines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.commands.arguments import json_object
from vllm_layerskip.errors import UserError

if TYPE_CHECKING:
    from vllm_layerskip.batch.output import Answer
    from vllm_layerskip.batch.rows import Row
    from vllm_layerskip.batch.settings import JobSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Folder or name of the checkpoint.")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="FILE",
        help="Files, folders or patterns of .jsonl or .parquet files.",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER",
        help="Gets output.jsonl (or output.parquet) and summary.json; what is needed to go on "
        "until then.",
    )  # fmt: skip
    output.add_argument(
        "--output-format", choices=("jsonl", "parquet"), default="jsonl", help="Default: jsonl."
    )
    output.add_argument("--token-ids", action="store_true", help="Also write the answers' tokens.")
    output.add_argument(
        "--overwrite", action="store_true", help="Begin anew if the folder has answers."
    )
    sampling = parser.add_argument_group(
        "sampling", "Of rows whose sampling_params do not say otherwise."
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="Default: 0, greedy.")
    sampling.add_argument("--top-p", type=float, metavar="P", help="Default: 1.")
    sampling.add_argument("--top-k", type=int, metavar="K", help="Default: 0, all tokens.")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="Default: 256.")
    sampling.add_argument("--stop", nargs="+", metavar="TEXT", help="Texts that end an answer.")
    sampling.add_argument("--seed", type=int, metavar="N", help="Of every row. Default: none.")
    sampling.add_argument("--ignore-eos", action="store_true", default=None)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--exit-layer", metavar="E", help="Default: the checkpoint's.")
    engine.add_argument(
        "--num-speculative-tokens", type=int, metavar="K", help="Default: the checkpoint's."
    )
    engine.add_argument(
        "--no-speculation",
        action="store_true",
        help="Plain vLLM: the same answers, for comparison.",
    )
    engine.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    engine.add_argument("--dtype", default=None, help="Default: auto; float32 on a CPU.")
    engine.add_argument("--max-model-len", type=int, metavar="N", help="Default: the model's.")
    engine.add_argument(
        "--device", choices=("cuda", "cpu"), help="Default: cuda if there is a GPU."
    )
    engine.add_argument(
        "--engine-args", type=json_object, default={}, metavar="JSON",
        help='Further arguments of vLLM\'s LLM, such as \'{"max_num_seqs": 64}\'.',
    )  # fmt: skip
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument(
        "--num-replicas", type=int, default=1, metavar="N",
        help="Engines that Ray Data runs. Default: 1, in this process and without Ray.",
    )  # fmt: skip
    replicas.add_argument(
        "--ray-address", metavar="ADDRESS",
        help="A Ray cluster, such as auto or ray://HOST:10001; uses Ray even for one replica. "
        "Default: this machine.",
    )  # fmt: skip
    replicas.add_argument(
        "--rows-per-task", type=int, default=16, metavar="N",
        help="Rows that a replica takes, and that run again if it dies, at once. Default: 16.",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from vllm_layerskip.batch import job
    from vllm_layerskip.batch.rows import input_files
    from vllm_layerskip.batch.settings import claim, clear

    files = input_files(args.input)
    settings = job_settings(args, files)
    generate = _generator(args, settings)
    if args.overwrite:
        clear(args.output)
    goes_on = claim(args.output, settings)
    output = args.output / f"output.{args.output_format}"
    if goes_on and output.exists():
        print(f"{output} is there already, and whole. --overwrite makes it anew.")
        return
    summary = job.run(
        files, settings.sampling_params, args.output, output, args.token_ids, generate
    )
    print(
        f"{summary.num_rows} rows, of which {summary.num_errors} with an error, "
        f"{summary.num_output_tokens} tokens: {output}"
    )
    if summary.num_rows_of_this_run:
        drafted = (
            ""
            if summary.acceptance_length is None
            else f", acceptance length {summary.acceptance_length}"
        )
        print(
            f"This run: {summary.num_rows_of_this_run} rows in {summary.seconds:.1f} s, "
            f"{summary.output_tokens_per_s:.1f} tokens/s with the engines' start{drafted}."
        )


def job_settings(args: argparse.Namespace, files: Iterable[Path]) -> JobSettings:
    """Check the options.

    Raises:
        UserError: one is wrong; the message names it, its value and what to do.
    """
    from vllm_layerskip.batch.parameters import merged
    from vllm_layerskip.batch.settings import JobSettings, file_digest

    for option in ("num_replicas", "rows_per_task", "tensor_parallel_size"):
        if getattr(args, option) < 1:
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(args, option)} must be an integer of at least 1.")
    names = ("temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "ignore_eos")
    defaults = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        defaults = merged(defaults, None)
    except ValueError as error:
        raise UserError(f"{str(error).replace('sampling_params: ', '')} (option)") from None
    return JobSettings(
        model=args.model,
        speculative_config=_speculative_config(args),
        engine_args=_engine_args(args),
        sampling_params=defaults,
        input=[(str(file), file_digest(file)) for file in files],
    )


def _speculative_config(args: argparse.Namespace) -> dict[str, Any] | None:
    chosen = {
        "exit_layer": args.exit_layer,
        "num_speculative_tokens": args.num_speculative_tokens,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not args.no_speculation:
        return {"method": "layerskip", **chosen}
    if chosen:
        flags = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
        raise UserError(f"--no-speculation excludes {flags}. Leave one of them out.")
    return None


def _engine_args(args: argparse.Namespace) -> dict[str, Any]:
    own = {"model": "--model", "speculative_config": "--exit-layer and --num-speculative-tokens"}
    for name, flag in own.items():
        if name in args.engine_args:
            raise UserError(f"--engine-args: {name} cannot be given there. Use {flag}.")
    arguments: dict[str, Any] = {"dtype": args.dtype or _default_dtype(args)}
    if args.max_model_len is not None:
        arguments["max_model_len"] = args.max_model_len
    if args.tensor_parallel_size != 1:
        arguments["tensor_parallel_size"] = args.tensor_parallel_size
    return {**arguments, **args.engine_args}


def _device(args: argparse.Namespace) -> str:
    from vllm_layerskip.measuring.hardware import gpu_info

    return args.device or ("cuda" if gpu_info() else "cpu")


def _default_dtype(args: argparse.Namespace) -> str:
    return "float32" if _device(args) == "cpu" else "auto"


def _generator(args: argparse.Namespace, settings: JobSettings) -> Any:
    if args.num_replicas == 1 and args.ray_address is None:
        from vllm_layerskip.batch import one_engine

        def in_this_process(rows: Iterable[Row]) -> Iterator[Answer]:
            return one_engine.answers(rows, settings)

        return in_this_process
    from vllm_layerskip.batch import ray_data

    cluster = ray_data.Cluster(
        args.num_replicas, args.ray_address, _device(args), args.rows_per_task
    )

    def on_the_cluster(rows: Iterable[Row]) -> Iterator[Answer]:
        return ray_data.answers(rows, settings, cluster)

    return on_the_cluster
