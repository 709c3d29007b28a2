# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts: JSON lines, Parquet or text in, JSON lines or Parquet out.

A row has `prompt`, `messages` (a chat) or `prompt_token_ids`, optionally `id` and
`sampling_params`; other columns are handed through. OpenAI's batch files are understood. Output is
in the order of the input. A row that cannot be served gets an `error` and no answer. A run that was
interrupted goes on where it was: give the same command again. A finished one writes its answers in
another --output-format or with --token-ids without an engine. With --num-replicas above 1, Ray Data
runs that many engines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.commands.arguments import add_dtype_and_device, checkpoint, engine_args
from vllm_layerskip.config.cli_args import exit_layer_argument
from vllm_layerskip.config.options import AUTO
from vllm_layerskip.errors import UserError, needs_extra
from vllm_layerskip.twins.kinds import CHOICES

if TYPE_CHECKING:
    from vllm_layerskip.batch.job import Summary
    from vllm_layerskip.batch.settings import BatchSettings, RayCluster

_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "ignore_eos")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=checkpoint, required=True, help="Folder or name of the checkpoint."
    )
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="FILE",
        help="Files, folders or patterns: .jsonl, .json, .parquet, or .txt with a prompt a line.",
    )  # fmt: skip
    parser.add_argument(
        "--text-field", default="prompt", metavar="NAME",
        help="Column of the prompts that are texts. Default: prompt.",
    )  # fmt: skip
    _add_output_arguments(parser)
    _add_sampling_arguments(parser)
    _add_engine_arguments(parser)
    _add_replica_arguments(parser)


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER",
        help="Gets output.jsonl (or output.parquet), summary.json, and the answers to go on from.",
    )  # fmt: skip
    group.add_argument(
        "--output-format", choices=("jsonl", "parquet"), default="jsonl", help="Default: jsonl."
    )
    group.add_argument("--token-ids", action="store_true", help="Also write the answers' tokens.")
    group.add_argument(
        "--overwrite", action="store_true", help="Begin anew if the folder has answers."
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "Of rows whose sampling_params do not say otherwise."
    )
    group.add_argument("--temperature", type=float, metavar="T", help="Default: 0, greedy.")
    group.add_argument("--top-p", type=float, metavar="P", help="Default: 1.")
    group.add_argument("--top-k", type=int, metavar="K", help="Default: 0, all tokens.")
    group.add_argument("--max-tokens", type=int, metavar="N", help="Default: 256.")
    group.add_argument("--stop", nargs="+", metavar="TEXT", help="Texts that end an answer.")
    group.add_argument("--seed", type=int, metavar="N", help="Of every row. Default: none.")
    group.add_argument("--ignore-eos", action="store_true", default=None)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--exit-layer", type=exit_layer_argument, metavar="E", help="Default: the checkpoint's."
    )
    group.add_argument(
        "--num-speculative-tokens", type=int, metavar="K", help="Default: the checkpoint's."
    )
    group.add_argument(
        "--draft-quantization", choices=(AUTO, *CHOICES), metavar="KIND",
        help=f"Bits of the layers that draft: {', '.join(CHOICES)}. Default: the checkpoint's.",
    )  # fmt: skip
    group.add_argument(
        "--draft-adapter", metavar="FOLDER",
        help="A LoRA adapter for the layers that draft. Default: the checkpoint's, if any.",
    )  # fmt: skip
    group.add_argument(
        "--no-speculation",
        action="store_true",
        help="Plain vLLM: the same answers, for comparison.",
    )
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    add_dtype_and_device(group)
    group.add_argument("--max-model-len", type=int, metavar="N", help="Default: the model's.")
    group.add_argument(
        "--engine-args", type=engine_args, default={}, metavar="JSON",
        help='Further arguments of vLLM\'s LLM, such as \'{"max_num_seqs": 64}\'.',
    )  # fmt: skip


def _add_replica_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("replicas")
    group.add_argument(
        "--num-replicas", type=int, default=1, metavar="N",
        help="Engines that Ray Data runs. Default: 1, in this process and without Ray.",
    )  # fmt: skip
    group.add_argument(
        "--ray-address", metavar="ADDRESS",
        help="A Ray cluster, such as auto or ray://HOST:10001; uses Ray even for one replica. "
        "Default: this machine.",
    )  # fmt: skip
    group.add_argument(
        "--rows-per-task", type=int, default=16, metavar="N",
        help="Rows that a replica takes, and that run again if it dies, at once. Default: 16.",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    with needs_extra("gpu"):
        from vllm_layerskip.batch.generate import generate

    settings = _settings(args)
    summary = generate(settings)
    if summary is None:
        print(f"{settings.output.file} is there already, and whole. --overwrite makes it anew.")
        return
    print(
        f"{summary.num_rows} rows, of which {summary.num_errors} with an error, "
        f"{summary.num_output_tokens} tokens: {settings.output.file}"
    )
    print(_this_run(summary))
    if summary.num_rows and summary.num_errors == summary.num_rows:
        raise UserError(
            f"no row could be answered. The first one: {summary.first_error} All reasons are in "
            f"{settings.output.file}."
        )


def _settings(args: argparse.Namespace) -> BatchSettings:
    from vllm_layerskip.batch.settings import BatchSettings, EngineSettings, OutputSettings
    from vllm_layerskip.measuring.cluster import check_answers
    from vllm_layerskip.measuring.hardware import check_device

    for name in ("num_replicas", "rows_per_task", "tensor_parallel_size"):
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(args, name)} must be an integer of at least 1.")
    cluster_is_used = args.num_replicas > 1 or args.ray_address is not None
    if cluster_is_used:
        check_answers(args.ray_address)
    else:
        check_device(args.device)
    device = args.device or _default_device()
    given: dict[str, Any] = {name: getattr(args, name) for name in _SAMPLING}
    return BatchSettings(
        inputs=args.input,
        output=OutputSettings(args.output, args.output_format, args.token_ids, args.overwrite),
        engine=EngineSettings(
            model=args.model,
            exit_layer=args.exit_layer,
            num_speculative_tokens=args.num_speculative_tokens,
            draft_quantization=args.draft_quantization,
            draft_adapter=args.draft_adapter,
            speculation=not args.no_speculation,
            tensor_parallel_size=args.tensor_parallel_size,
            device=device,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            engine_args=args.engine_args,
        ),
        sampling_params={name: value for name, value in given.items() if value is not None},
        cluster=_cluster(args, device) if cluster_is_used else None,
        text_field=args.text_field,
    )


def _default_device() -> str:
    from vllm_layerskip.measuring.hardware import gpu_info

    return "cuda" if gpu_info() else "cpu"


def _cluster(args: argparse.Namespace, device: str) -> RayCluster:
    from vllm_layerskip.batch.settings import RayCluster

    return RayCluster(args.num_replicas, args.ray_address, device, args.rows_per_task)


def _this_run(summary: Summary) -> str:
    if not summary.num_rows_of_this_run:
        return "No row was left to answer, and no engine was started."
    drafted = ""
    if summary.acceptance_length is not None:
        drafted = f", acceptance length {summary.acceptance_length}"
    return (
        f"This run: {summary.num_rows_of_this_run} rows in {summary.seconds:.1f} s, "
        f"{summary.output_tokens_per_s:.1f} tokens/s with the engines' start{drafted}."
    )
