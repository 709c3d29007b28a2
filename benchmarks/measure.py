# SPDX-License-Identifier: Apache-2.0
"""Measure one mode in one process and print a JSON record.

    python benchmarks/measure.py --mode layerskip --shape llama-3-8b --exit-layer 4 \\
        --num-speculative-tokens 4 --synthetic-acceptance-length 3.0 --batch-size 1

Shapes run with dummy weights; synthetic acceptance then separates what a step costs from how
good the drafts are. `--model DIR` measures a real checkpoint and its real acceptance. Only
decoding is timed: every prompt is prefilled first, and the time to the first token of the last
request is taken off. `benchmarks/compare.py` runs several modes and makes a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODES = ("plain", "layerskip", "layerskip-no-reuse", "ngram")

SHAPES: dict[str, dict[str, int]] = {
    # hidden, intermediate, layers, heads, kv heads, vocabulary (the models' config.json)
    "llama-2-7b": dict(zip("hilakv", (4096, 11008, 32, 32, 32, 32000), strict=True)),
    "llama-3-8b": dict(zip("hilakv", (4096, 14336, 32, 32, 8, 128256), strict=True)),
    "llama-3.2-1b": dict(zip("hilakv", (2048, 8192, 16, 32, 8, 128256), strict=True)),
    "tiny": dict(zip("hilakv", (64, 128, 8, 2, 2, 512), strict=True)),
}


def write_shape(name: str, max_model_len: int, folder: Path) -> Path:
    """A checkpoint folder that holds a config only; weights are dummies."""
    shape = SHAPES[name]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["h"],
        "intermediate_size": shape["i"],
        "num_hidden_layers": shape["l"],
        "num_attention_heads": shape["a"],
        "num_key_value_heads": shape["k"],
        "vocab_size": shape["v"],
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def speculative_config(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.mode == "plain":
        return None
    if args.mode == "ngram":
        return {
            "method": "ngram_gpu",
            "num_speculative_tokens": args.num_speculative_tokens,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    config: dict[str, Any] = {
        "method": "layerskip",
        "exit_layer": args.exit_layer,
        "num_speculative_tokens": args.num_speculative_tokens,
        "reuse_exit_states": args.mode == "layerskip",
    }
    if args.synthetic_acceptance_length is not None:
        config["rejection_sample_method"] = "synthetic"
        config["synthetic_acceptance_length"] = args.synthetic_acceptance_length
    return config


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Decode ``batch_size`` random prompts ``repeats`` times."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    dummy = args.model is None
    max_model_len = args.prompt_len + args.output_len + 1
    start = time.perf_counter()
    llm = LLM(
        str(model),
        load_format="dummy" if dummy else "auto",
        skip_tokenizer_init=dummy,
        dtype=args.dtype,
        max_model_len=max_model_len,
        max_num_seqs=args.batch_size,
        enforce_eager=args.enforce_eager,
        enable_prefix_caching=False,
        speculative_config=speculative_config(args),
        disable_log_stats=False,
        seed=0,
        **({"kv_cache_memory_bytes": 256 << 20} if args.device == "cpu" else {}),
    )
    start_s = time.perf_counter() - start

    config = llm.llm_engine.vllm_config
    vocab_size = config.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(
        3, vocab_size, (args.batch_size, args.prompt_len), generator=generator
    )
    prompts = [TokensPrompt(prompt_token_ids=row) for row in token_ids.tolist()]

    def run(max_tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    run(min(8, args.output_len))  # Warm-up.
    prefill_s = [run(1) for _ in range(args.repeats)]
    total_s = [run(args.output_len) for _ in range(args.repeats)]
    decode_s = min(total_s) - min(prefill_s)
    num_tokens = args.batch_size * (args.output_len - 1)
    record: dict[str, Any] = {
        "mode": args.mode,
        "batch_size": args.batch_size,
        "start_s": round(start_s, 2),
        "prefill_s": prefill_s,
        "total_s": total_s,
        "decode_tokens_per_s": round(num_tokens / decode_s, 2),
    }
    if args.mode.startswith("layerskip"):
        from vllm_layerskip.counters import read_counters

        counters = read_counters(llm)
        record["acceptance_length"] = round(counters.acceptance_length, 3)
        record["num_verify_steps_reused"] = counters.num_verify_steps_reused
        record["num_verify_steps_full"] = counters.num_verify_steps_full
    return record


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    import vllm_layerskip
    from vllm_layerskip.host import vllm_version

    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "argv": sys.argv[1:],
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "commit": commit or None,
        "versions": {
            "vllm": vllm_version(),
            "vllm-layerskip": vllm_layerskip.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--mode", choices=MODES, required=True)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as folder:
        max_model_len = args.prompt_len + args.output_len + 1
        model = args.model or write_shape(args.shape, max_model_len, Path(folder))
        record = measure(args, model) | {"provenance": provenance(args)}
    print("RECORD " + json.dumps(record), flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that measure.py and compare.py share."""
    parser.add_argument("--model", type=Path, help="A checkpoint; default: --shape with dummies.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--exit-layer", type=int, default=4)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--synthetic-acceptance-length", type=float)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--enforce-eager", action="store_true")


if __name__ == "__main__":
    main()
