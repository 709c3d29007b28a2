# SPDX-License-Identifier: Apache-2.0
"""The engines of ``benchmarks.gpu.check_graphs``: plain vLLM, and LayerSkip's variants."""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.verdict import Answers, Observed, differences, faults
from vllm_layerskip.files.corpus import held_out_prompts, load_stdlib
from vllm_layerskip.metrics.counters import SpecDecodeCounters, read_counters
from vllm_layerskip.twins.kinds import NONE

if TYPE_CHECKING:
    from vllm import LLM

AS_SERVED = "layerskip"
WITHOUT_REUSE = "without reuse"
DRAFTS_WITHOUT_GRAPHS = "drafts without graphs"
EAGER = "without any graph"
VARIANTS = (AS_SERVED, WITHOUT_REUSE, DRAFTS_WITHOUT_GRAPHS, EAGER)
"""LayerSkip as users run it, then without one part each: the order of narrowing a failure down."""


def prepare_environment() -> None:
    """Variables that must stand before vLLM is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_GPU_SYNC_CHECK", "warn")
    # Triton's products of float32 are TF32 otherwise, in attention too: ten bits of mantissa.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def check_arguments(args: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    """Arguments of every engine."""
    arguments: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": 512,
        "max_num_seqs": args.num_prompts,
        "enforce_eager": not on_gpu,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 256 << 20,
        "disable_log_stats": False,
        "seed": 0,
    }
    return arguments | _gpu_arguments(args) if on_gpu else arguments


def _gpu_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Few graphs, so that an engine starts fast, and a padded one among them."""
    # Of 1 and of all requests, with one token each and with 1 + K.
    per_request = (1, 1 + args.num_speculative_tokens)
    sizes = sorted({tokens * size for tokens in per_request for size in (1, args.num_prompts)})
    arguments: dict[str, Any] = {
        # The KV cache's size is given; this much must be free when an engine starts.
        "gpu_memory_utilization": 0.3,
        "kernel_config": {"enable_jit_warmup": False},  # Each capture warms up by itself.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
        },
    }
    if args.dtype == "float32":
        arguments["attention_backend"] = "TRITON_ATTN"  # FlashAttention takes no float32.
    return arguments


def answer(llm: LLM, prompts: list[str], max_tokens: int, logprobs: int | None) -> Answers:
    """The engine's greedy answers to all prompts at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs
    )
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    seconds = time.perf_counter() - start
    places = {(warning.filename, warning.lineno) for warning in caught if is_wait(warning)}
    return Answers(
        token_ids=[list(output.token_ids) for output in outputs],
        logprobs=[
            [{token: entry.logprob for token, entry in at.items()} for at in output.logprobs or ()]
            for output in outputs
        ],
        seconds=seconds,
        waits=tuple(sorted("/".join(Path(file).parts[-2:]) + f":{line}" for file, line in places)),
    )


def is_wait(warning: warnings.WarningMessage) -> bool:
    """Whether torch or vLLM warns of a wait for the GPU."""
    text = str(warning.message)
    return "synchronizing CUDA operation" in text or "GPU<->CPU sync" in text


def count_replays(llm: LLM) -> Counter[str]:
    """A counter of the replays of FULL graphs from now on, by kind: ``verify`` and ``draft``."""
    runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    counts: Counter[str] = Counter()
    managers = {"verify": runner.cudagraph_manager}
    if runner.speculator is not None:
        managers["draft"] = runner.speculator.draft_graphs
    for name, manager in managers.items():
        if manager is not None:
            manager.run_fullgraph = _counted(manager.run_fullgraph, counts, name)
    return counts


def _counted(run: Callable[[Any], Any], counts: Counter[str], name: str) -> Callable[[Any], Any]:
    def run_fullgraph(desc: Any) -> Any:
        counts[name] += 1
        return run(desc)

    return run_fullgraph


def observe(
    plain: Answers, answers: Answers, counters: SpecDecodeCounters, replays: Mapping[str, int]
) -> Observed:
    """What a LayerSkip engine did between two readings of its counters."""
    found = differences(plain, answers)
    num_tokens = sum(map(len, plain.token_ids))
    cut = sum(len(plain.token_ids[one.prompt]) - one.position for one in found)
    return Observed(
        differences=found,
        num_compared=num_tokens - cut,
        num_tokens=num_tokens,
        num_accepted=counters.num_accepted_tokens,
        num_reused=counters.num_verify_steps_reused,
        num_full=counters.num_verify_steps_full,
        num_replays=dict(replays),
    )


class Check:
    """The engines of one process; all are kept, since they share one pool of graph memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm.platforms import current_platform

        self.args = args
        self.on_gpu = not current_platform.is_cpu()
        self.arguments = check_arguments(args, self.on_gpu)
        self.request: dict[str, Any] = {
            "method": "layerskip",
            "exit_layer": args.exit_layer,
            "num_speculative_tokens": args.num_speculative_tokens,
        }
        self.twin = args.draft_quantization
        if self.twin != NONE:
            self.request["draft_quantization"] = self.twin
        self.prompts = [text for _, text in held_out_prompts(load_stdlib(), args.num_prompts)]
        self._engines: list[LLM] = []

    def run_plain(self) -> Answers:
        llm = self._start({}, None)
        with_logprobs = answer(llm, self.prompts, self.args.max_tokens, logprobs=5)
        # Again without log-probabilities, as LayerSkip answers: they cost time and waits.
        plain = answer(llm, self.prompts, self.args.max_tokens, logprobs=None)
        return replace(plain, logprobs=with_logprobs.logprobs)

    def run(self, variant: str, plain: Answers) -> dict[str, Any]:
        """One LayerSkip engine's answers against plain decoding's."""
        engine = {"enforce_eager": True} if variant == EAGER else {}
        spec = dict(self.request)
        if variant == WITHOUT_REUSE:
            spec["reuse_exit_states"] = False
            spec.pop("draft_quantization", None)  # A twin never reuses: without it, then.
        with _drafts_without_graphs() if variant == DRAFTS_WITHOUT_GRAPHS else nullcontext():
            llm = self._start(engine, spec)
        replays = count_replays(llm)
        before = read_counters(llm)
        answers = answer(llm, self.prompts, self.args.max_tokens, logprobs=None)
        counters = read_counters(llm) - before
        seen = observe(plain, answers, counters, replays)
        # The first answers compile kernels; plain decoding's time is that of second answers too.
        again = answer(llm, self.prompts, self.args.max_tokens, logprobs=None)
        num_answers = len(self.prompts)
        return asdict(seen) | {
            "variant": variant,
            "draft_quantization": spec.get("draft_quantization", NONE),
            "num_answers": num_answers,
            "num_equal": num_answers - len(seen.differences),
            "acceptance_length": round(counters.acceptance_length, 3),
            "waits": sorted(set(answers.waits) - set(plain.waits)),
            "answer_s": {"plain": round(plain.seconds, 3), "layerskip": round(again.seconds, 3)},
            "problems": faults(seen, self.args.dtype, *self._expected(variant)),
        }

    def _expected(self, variant: str) -> tuple[set[str], set[str]]:
        """What must happen, and what must not."""
        happens = {"draft", "verify"} if self.on_gpu else set()
        happens |= {"reuse"} if self.twin == NONE else set()
        without = {
            WITHOUT_REUSE: {"reuse"},
            DRAFTS_WITHOUT_GRAPHS: {"draft"},
            EAGER: {"draft", "verify"},
        }.get(variant, set())
        without |= {"reuse"} if self.twin != NONE else set()
        return happens - without, without

    def _start(self, engine: dict[str, Any], request: dict[str, Any] | None) -> LLM:
        from vllm import LLM

        llm = LLM(**self.arguments | engine, speculative_config=request)
        self._engines.append(llm)
        return llm


@contextmanager
def _drafts_without_graphs() -> Iterator[None]:
    os.environ["LAYERSKIP_DRAFT_GRAPHS"] = "0"
    try:
        yield
    finally:
        del os.environ["LAYERSKIP_DRAFT_GRAPHS"]
