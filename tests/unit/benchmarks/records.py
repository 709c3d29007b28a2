# SPDX-License-Identifier: Apache-2.0
"""Settings, records and questions that several tests use."""

from __future__ import annotations

import argparse
import gzip
import json

from benchmarks.engines import results
from benchmarks.engines.settings import Settings, add_arguments, settings_from

SPEC_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
HUMAN_EVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}
GSM8K = {"question": "How many?", "answer": "#### 3"}


def write_lines(path, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def parse_settings(*argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_from(parser.parse_args(argv))


def tiny_settings() -> Settings:
    return parse_settings("--tiny", "--device", "cpu")


def decode_record(mode: str, batch_size: int, speed: float, **changes) -> results.Record:
    """A record as benchmarks.decode.measure writes it."""
    settings = parse_settings("--preset", "7b-cnndm")
    drafts = None if mode == "plain" else {"acceptance_length": 9.27, "num_drafts": 10}
    if mode == "layerskip":
        drafts |= {"num_verify_steps_reused": 9, "num_verify_steps_full": 1}
    num_tokens = 1000 * batch_size if mode == "plain" else 9270 * batch_size
    run = {"seconds": 1.0, "num_tokens": num_tokens, "num_steps": 1000, "tokens_per_s": speed}
    return {
        "kind": "decode",
        "mode": mode,
        "settings": settings.identity(),
        "model_shape": vars(settings.model_shape()),
        "num_draft_vocab_ids": None,
        "provenance": {
            "command": "python -m benchmarks.decode.compare --preset 7b-cnndm",
            "commit": {"id": "abc", "dirty": False},
            "versions": {"vllm": "0.32.0"},
            "gpu": {"name": "NVIDIA H200", "driver": "580", "memory": "143771 MiB"},
            "cpu": {"model": "cpu", "count": 2},
        },
        "prompt_len": 128,
        "batch_size": batch_size,
        "engine": {"start_s": 60.0, "fresh_cache": False, "memory": {"kv_cache_bytes": 10**9},
                   "kv_capacity_tokens": 1000},
        "status": "ok",
        "tokens_per_s": speed,
        "step_ms": 1.0,
        "runs": [run, run, run],
        "speculation": drafts,
        **changes,
    }  # fmt: skip


def serve_record(concurrency: int = 4) -> results.Record:
    record = decode_record("plain", 1, 1.0)
    names = ("output_throughput", "median_tpot_ms", "p99_tpot_ms", "median_ttft_ms", "p99_ttft_ms")
    for name in ("prompt_len", "batch_size", "engine", "runs"):
        del record[name]
    result = dict.fromkeys(names, 1.5) | {"completed": 26}
    return record | {"kind": "serve", "concurrency": concurrency, "result": result}
