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


def prompts_answer(key, tokens, steps, accepted, *, total_ms, tpot_ms, output="same", category="c"):
    """An answer as benchmarks.prompts.records has it in memory."""
    return {
        "key": key, "question": key.rpartition("#")[0], "category": category,
        "num_tokens": tokens, "num_steps": steps, "num_accepted_tokens": accepted,
        "output": f"{output:<6.6}", "same_in_every_run": True,
        "tpot_ms": tpot_ms, "total_ms": total_ms,
    }  # fmt: skip


def prompts_record(mode, *answers, temperature=0.0, e=3, k=5):
    """A record of benchmarks.prompts.real_prompts, one request at a time."""
    if mode == "plain":
        answers = [a | {"num_accepted_tokens": 0} for a in answers]
    return {
        "mode": mode,
        "answers": list(answers),
        "settings": {"exit_layer": e, "num_speculative_tokens": k, "draft_vocab": None,
                     "batch_size": 1},
        "sampling": {"temperature": temperature},
    }  # fmt: skip


def real_model_records(dtype="bfloat16", temperature=0.0, batch_size=1, equal=True, repeats=2):
    """Plain decoding, two drafts and a draft model, as a whole file has them."""
    categories = ("writing", "math")
    return [
        _real_model_record(mode, name, number, categories, dtype, temperature, equal)
        | {"runs_tokens_per_s": [10.0 * number, 12.0 * number][:repeats]}
        | {"settings": _real_model_settings(dtype, batch_size, repeats)}
        for number, (mode, name) in enumerate(
            (("plain", None), ("layerskip", "early"), ("layerskip", "int4"), ("draft-model", None)),
            start=1,
        )
    ]  # fmt: skip


def _real_model_settings(dtype, batch_size, repeats):
    return {"model": "build/Small-1B-Instruct", "exit_layer": 8, "num_speculative_tokens": 4,
            "draft_vocab": None, "dtype": dtype, "batch_size": batch_size,
            "repeats": repeats}  # fmt: skip


def _real_model_record(mode, name, number, categories, dtype, temperature, equal):
    is_plain = mode == "plain"
    answers = [
        prompts_answer(
            f"{i}#0", 41, 40 // number, 40 - 40 // number, category=category,
            total_ms=[900.0 / number, 990.0 / number], tpot_ms=[20.0 / number, 22.0 / number],
            output="same" if equal or is_plain or i % 2 else "other",
        )
        for i, category in enumerate(categories * 2)
    ]  # fmt: skip
    config = {"exit_layer": 8, "num_speculative_tokens": 4, "draft_vocab": "none"}
    return prompts_record(mode, *answers, temperature=temperature) | {
        "drafts": None if name is None else {"name": name, "config": config},
        "sampling": {"temperature": temperature, "ignore_eos": False, "max_tokens": 64,
                     "max_prompt_tokens": 900},
        "num_accepted_at": [] if is_plain else [60, 30],
        "questions": {"file": "question.jsonl", "sha256": "ab" * 32, "num_questions": 4, "of": 480,
                      "too_long": {}},
        "later_turns_left_out": {},
        "provenance": {
            "command": f"python -m benchmarks.prompts.real_prompts --dtype {dtype}",
            "commit": {"id": "abc", "dirty": False}, "versions": {"vllm": "0.32.0"}, "gpu": None,
            "cpu": {"model": "cpu", "count": 2},
        },
    }  # fmt: skip
