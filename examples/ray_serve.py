# SPDX-License-Identifier: Apache-2.0
"""Serve a LayerSkip model with Ray Serve LLM: replicas, tensor parallelism, an OpenAI API.

    python examples/ray_serve.py --model MODEL --num-replicas 2 --tensor-parallel-size 1

Ray Serve places the replicas on the cluster's GPUs, restarts them, and balances requests. LayerSkip
is one entry of the engine's arguments. With --cpu replicas run on CPUs, to try it.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

HANDED_ON = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE")


def speculative_config(args: argparse.Namespace) -> dict[str, Any]:
    """E and K come from the checkpoint unless they are stated."""
    chosen = {
        "exit_layer": args.exit_layer,
        "num_speculative_tokens": args.num_speculative_tokens,
    }
    return {"method": "layerskip"} | {k: v for k, v in chosen.items() if v is not None}


def llm_config(args: argparse.Namespace) -> LLMConfig:
    """One model for Ray Serve LLM."""
    engine: dict[str, Any] = {
        "speculative_config": speculative_config(args),
        "tensor_parallel_size": args.tensor_parallel_size,
        # Answers say how many drafts were accepted.
        "per_request_spec_decode_metrics": "summary",
    }
    if args.max_model_len is not None:
        engine["max_model_len"] = args.max_model_len
    options: dict[str, Any] = {}
    if args.cpu:
        engine |= {"dtype": "float32", "enforce_eager": True}
        options["accelerator_config"] = {"kind": "cpu"}
        options["placement_group_config"] = {"bundle_per_worker": {"CPU": 1}}
    elif args.accelerator_type is not None:
        options["accelerator_type"] = args.accelerator_type
    variables = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    return LLMConfig(
        model_loading_config={"model_id": args.model_id, "model_source": args.model},
        engine_kwargs=engine,
        deployment_config={"num_replicas": args.num_replicas},
        runtime_env={"env_vars": variables},
        **options,
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Folder or name of the checkpoint.")
    parser.add_argument("--model-id", default="layerskip", help="The name that clients use.")
    parser.add_argument("--exit-layer", type=int, help="Default: the checkpoint's.")
    parser.add_argument("--num-speculative-tokens", type=int, help="Default: the checkpoint's.")
    parser.add_argument("--num-replicas", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--accelerator-type", help="Such as H100; default: any GPU.")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--ray-address", help="Default: RAY_ADDRESS, or this machine.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cpu", action="store_true", help="Run the replicas on CPUs.")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    # On this machine the API's own processes need CPUs, too, besides the replicas'.
    local = args.cpu and args.ray_address is None
    ray.init(address=args.ray_address, **({"num_cpus": 2 * args.num_replicas + 4} if local else {}))
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(build_openai_app({"llm_configs": [llm_config(args)]}), blocking=True)


if __name__ == "__main__":
    main()
