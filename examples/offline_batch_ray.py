# SPDX-License-Identifier: Apache-2.0
"""Batch inference with Ray Data's LLM processor and LayerSkip, to copy and change.

    python examples/offline_batch_ray.py --model MODEL --input prompts.jsonl --output out/

`vllm-layerskip generate --num-replicas N` does the same and more: it checks rows, keeps their order
and goes on after a crash. This is the shortest way to put LayerSkip into a pipeline of your own.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True, help="JSON lines with a `prompt` each.")
    parser.add_argument("--output", required=True, help="A folder for JSON lines.")
    parser.add_argument("--num-replicas", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--cpu", action="store_true", help="Run the replicas on CPUs.")
    args = parser.parse_args()

    # Replicas get the variables that this process has.
    names = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    # Each replica takes a CPU, and Ray Data's other stages need some, too.
    options = {"num_cpus": args.num_replicas + 2} if args.cpu else {}
    ray.init(runtime_env={"env_vars": variables}, **options)

    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs={
            # All that LayerSkip needs. E and K come from the checkpoint; if it names none, add
            # "exit_layer" and "num_speculative_tokens" here.
            "speculative_config": {"method": "layerskip"},
            "tensor_parallel_size": args.tensor_parallel_size,
            **({"dtype": "float32", "enforce_eager": True} if args.cpu else {}),
        },
        placement_group_config={"bundle_per_worker": {"CPU": 1}} if args.cpu else None,
        concurrency=(args.num_replicas, args.num_replicas),
        batch_size=16,
        should_continue_on_error=True,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )

    def to_request(row: dict[str, Any]) -> dict[str, Any]:
        params = {"temperature": 0.0, "max_tokens": args.max_tokens}
        return {"prompt": row["prompt"], "sampling_params": params}

    def to_result(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["prompt"], "text": row["generated_text"]}

    processor = build_processor(config, preprocess=to_request, postprocess=to_result)
    processor(ray.data.read_json(args.input)).write_json(args.output)


if __name__ == "__main__":
    main()
