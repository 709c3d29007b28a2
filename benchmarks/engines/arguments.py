# SPDX-License-Identifier: Apache-2.0
"""The engine of a mode: its model folder and vLLM's arguments.

All arguments that are not measured keep vLLM's defaults, so every mode runs as a user would run it.
One exception, on a GPU: where every step of a table is one of a few batches, CUDA graphs are
captured for these. vLLM's default sizes end at 512 tokens, so a verification of more than
512 / (K + 1) requests would run without a graph, and they hold dozens that no cell would use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engines.cut_checkpoint import write_cut_checkpoint
from benchmarks.engines.modes import CUT_MODES, speculative_config, write_draft_vocab
from benchmarks.engines.settings import Settings

FRESH_CACHE_VARIABLE = "BENCHMARK_FRESH_CACHE"


def empty_caches(folder: Path) -> dict[str, str]:
    """Variables that put vLLM's, Inductor's and Triton's compile caches into ``folder``."""
    names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: str(folder / name.lower()) for name in names} | {FRESH_CACHE_VARIABLE: "1"}


def prepare_environment(device: str) -> None:
    """Variables that must stand before vLLM is imported."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # So that a function of ours can count a worker's memory; all processes are on this machine.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def prepare_models(settings: Settings, mode: str, folder: Path) -> tuple[Path, Path | None]:
    """The model folder to serve, and the folder of the cut model if the mode needs one."""
    shape, max_model_len = settings.model_shape(), settings.max_model_len
    if settings.model is not None:
        model = Path(settings.model)
    else:
        model = shape.write_config(folder / "model", max_model_len)
    if mode not in CUT_MODES:
        return model, None
    cut = folder / f"first-{settings.exit_layer}-layers"
    if settings.model is None:
        shape.first_layers(settings.exit_layer).write_config(cut, max_model_len)
    else:
        write_cut_checkpoint(model, settings.exit_layer, cut)
    return (cut, None) if mode == "early-exit" else (model, cut)


def engine_arguments(
    settings: Settings, mode: str, folder: Path, fixed_batches: bool = False
) -> dict[str, Any]:
    """Arguments of ``LLM``; what is not measured keeps vLLM's defaults.

    Args:
        fixed_batches: every step that is timed is one of ``settings.batch_sizes``.
    """
    model, cut = prepare_models(settings, mode, folder)
    dummy = settings.model is None
    vocab_size = settings.model_shape().vocab_size
    speculation = settings.speculation()
    if settings.draft_vocab is not None:
        path = write_draft_vocab(settings.draft_vocab, vocab_size, folder)
        speculation = replace(speculation, draft_vocab=path)
    given = dict(settings.engine_args)
    compilation = given.pop("compilation_config", {})
    if fixed_batches and settings.device == "cuda" and not settings.enforce_eager:
        compilation = {"cudagraph_capture_sizes": capture_sizes(settings)} | compilation
    return {
        "model": str(model),
        "load_format": "dummy" if dummy else "auto",
        "skip_tokenizer_init": dummy,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": max(settings.batch_sizes),
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": True,
        "speculative_config": speculative_config(mode, speculation, cut),
        "disable_log_stats": False,
        "seed": 0,
        **({"kv_cache_memory_bytes": 64 << 20} if settings.device == "cpu" else {}),
        **({"compilation_config": compilation} if compilation else {}),
        **given,
    }


def capture_sizes(settings: Settings) -> list[int]:
    """Numbers of tokens of the table's steps: each batch with 1 token a request and with 1 + K."""
    all_k = {0, settings.num_speculative_tokens, *(k for _, _, k in settings.schedule or ())}
    return sorted({batch * (1 + k) for batch in settings.batch_sizes for k in all_k})


def command_line_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as options of ``vllm serve``, which takes the model by position."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None or name == "model":
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            flags += [f"--{flag}", text]
    return flags
