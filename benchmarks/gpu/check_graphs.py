# SPDX-License-Identifier: Apache-2.0
"""Does LayerSkip on CUDA graphs write plain decoding's tokens? On a trained checkpoint, greedily.

    python -m benchmarks.gpu.check_graphs --output exact.json
    python -m benchmarks.gpu.check_graphs --dtype bfloat16 --output bf16.json

Engines follow each other in one process, with FULL decode graphs and without torch.compile: plain
vLLM, then LayerSkip. All answer the same prompts at once. The check fails if

* an answer differs where the two best tokens are further apart than rounding explains, or answers
  differ so early that little was compared,
* no draft was accepted, or most verify steps did not start from exit states,
* on a GPU, most steps did not replay their graph: then eager steps would have passed for graphs.

Batches of other sizes sum in another order, so two tokens of nearly the same logit can change
places, in float32 too. At the first token that differs plain decoding's log-probabilities tell:
``gap`` is how far its token lies ahead of LayerSkip's there. In bfloat16 gaps are larger, so
LayerSkip without reuse runs as well: its gaps are rounding, since its verification is vLLM's own.

vLLM looks for waits of the host for the GPU meanwhile (VLLM_GPU_SYNC_CHECK). Those that plain
decoding does not have are named and fail nothing: they cost speed.

float32 needs Triton's attention on a GPU; bfloat16 takes what users run, FlashAttention 3. If
LayerSkip fails, more engines follow, each without one part of it: the first that passes says where
to look. They have processes of their own, since a CUDA error stays with the process that had it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engines.results import write_json
from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.measuring.provenance import provenance

if TYPE_CHECKING:
    from vllm import LLM

ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}
"""Of a difference between log-probabilities; a wrong draft pass makes whole units."""
LEAST_COMPARED = 0.25
"""Share of all tokens that lie in front of the first difference of their answer."""
LEAST_SHARE = 0.5
"""Of the verify steps, those that reuse exit states and those that replay a graph."""

AS_SERVED = "layerskip"
WITHOUT_REUSE = "without reuse"
DRAFTS_WITHOUT_GRAPHS = "drafts without graphs"
EAGER = "without any graph"
VARIANTS = (AS_SERVED, WITHOUT_REUSE, DRAFTS_WITHOUT_GRAPHS, EAGER)


@dataclass(frozen=True)
class Difference:
    """The first token of an answer that differs from plain decoding's."""

    prompt: int
    position: int
    plain_token: int
    token: int
    gap: float | None
    """Plain decoding's log-probability of its token less that of ours; None if ours is not
    among those that it reported."""

    def is_rounding(self, dtype: str) -> bool:
        return self.gap is not None and self.gap <= ROUNDING[dtype]


@dataclass(frozen=True)
class Facts:
    """What one LayerSkip engine did while it answered."""

    differences: list[Difference]
    num_compared: int
    """Tokens up to the first difference of each answer."""
    num_tokens: int
    num_accepted: int
    num_reused: int
    num_full: int
    num_replays: Mapping[str, int]


@dataclass(frozen=True)
class Answers:
    token_ids: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    """By answer and position: log-probabilities of the best tokens."""
    seconds: float
    waits: tuple[str, ...] = ()
    """``file:line`` of the waits for the GPU that vLLM saw."""


def prepare_environment() -> None:
    """Variables that must stand before vLLM is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_GPU_SYNC_CHECK", "warn")
    # Triton's products of float32 are TF32 otherwise, in attention too: ten bits of mantissa.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def engine_arguments(args: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    """Every engine's: few graphs, so that they start fast; a padded one among them."""
    num_reqs = args.num_prompts
    # Of 1 and of all requests, with one token each and with 1 + K.
    per_request = (1, 1 + args.num_speculative_tokens)
    sizes = sorted({tokens * size for tokens in per_request for size in (1, num_reqs)})
    arguments: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": 512,
        "max_num_seqs": num_reqs,
        "enforce_eager": not on_gpu,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 256 << 20,
        "disable_log_stats": False,
        "seed": 0,
    }
    if on_gpu:
        arguments |= {
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
    """Every prompt at once, greedily."""
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
    """Counts the replays of both managers' FULL graphs from now on, by kind."""
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


def differences(plain: Answers, other: Answers) -> list[Difference]:
    """The first difference of each answer that has one."""
    found = []
    for prompt, (expected, tokens) in enumerate(zip(plain.token_ids, other.token_ids, strict=True)):
        pairs = enumerate(zip(expected, tokens, strict=True))
        position = next((index for index, (one, two) in pairs if one != two), None)
        if position is not None:
            one, two = expected[position], tokens[position]
            best = plain.logprobs[prompt][position]
            gap = best[one] - best[two] if two in best else None
            found.append(Difference(prompt, position, one, two, gap))
    return found


def faults(
    facts: Facts, dtype: str, expected: Collection[str], ruled_out: Collection[str] = ()
) -> list[str]:
    """What a check of these facts must fail for.

    Args:
        expected: what must have happened: ``draft`` and ``verify`` graphs, ``reuse``.
        ruled_out: what must not.
    """
    problems = [
        f"answer {one.prompt} differs at token {one.position}: {one.token} for {one.plain_token}, "
        f"log-probability gap {one.gap}"
        for one in facts.differences
        if not one.is_rounding(dtype)
    ]
    if facts.num_compared < LEAST_COMPARED * facts.num_tokens:
        problems.append(f"only {facts.num_compared} of {facts.num_tokens} tokens were compared")
    if facts.num_accepted == 0:
        problems.append("no draft was accepted")
    num_steps = facts.num_reused + facts.num_full
    happened = {"reuse": facts.num_reused, "draft": 0, "verify": 0} | dict(facts.num_replays)
    names = {"reuse": "verify steps reused exit states", "draft": "draft graphs were replayed",
             "verify": "verify graphs were replayed"}  # fmt: skip
    for kind, name in names.items():
        too_few = kind in expected and happened[kind] <= LEAST_SHARE * num_steps
        if too_few or (kind in ruled_out and happened[kind]):
            problems.append(f"{happened[kind]} {name} in {num_steps} steps")
    return problems


class Check:
    """Engines of one process, all kept: they share one pool of graph memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm.platforms import current_platform

        from vllm_layerskip.files.corpus import held_out_prompts, load_stdlib

        self.args = args
        self.on_gpu = not current_platform.is_cpu()
        self.arguments = engine_arguments(args, self.on_gpu)
        self.request: dict[str, Any] = {
            "method": "layerskip",
            "exit_layer": args.exit_layer,
            "num_speculative_tokens": args.num_speculative_tokens,
        }
        self.prompts = [text for _, text in held_out_prompts(load_stdlib(), args.num_prompts)]
        self._engines: list[LLM] = []

    def run_plain(self) -> Answers:
        llm = self._start({}, None)
        with_logprobs = answer(llm, self.prompts, self.args.max_tokens, logprobs=5)
        # Once more as LayerSkip answers: log-probabilities cost time and waits.
        plain = answer(llm, self.prompts, self.args.max_tokens, logprobs=None)
        return replace(plain, logprobs=with_logprobs.logprobs)

    def run(self, variant: str, plain: Answers) -> dict[str, Any]:
        """One LayerSkip engine's answers against plain decoding's."""
        from vllm_layerskip.metrics.counters import read_counters

        engine = {"enforce_eager": True} if variant == EAGER else {}
        spec = {"reuse_exit_states": False} if variant == WITHOUT_REUSE else {}
        with _drafts_without_graphs() if variant == DRAFTS_WITHOUT_GRAPHS else nullcontext():
            llm = self._start(engine, self.request | spec)
        replays = count_replays(llm)
        before = read_counters(llm)
        answers = answer(llm, self.prompts, self.args.max_tokens, logprobs=None)
        counters = read_counters(llm) - before
        found = differences(plain, answers)
        num_tokens = sum(map(len, plain.token_ids))
        cut = sum(len(plain.token_ids[one.prompt]) - one.position for one in found)
        facts = Facts(
            differences=found,
            num_compared=num_tokens - cut,
            num_tokens=num_tokens,
            num_accepted=counters.num_accepted_tokens,
            num_reused=counters.num_verify_steps_reused,
            num_full=counters.num_verify_steps_full,
            num_replays=dict(replays),
        )
        return asdict(facts) | {
            "variant": variant,
            "num_answers": len(self.prompts),
            "num_equal": len(self.prompts) - len(found),
            "acceptance_length": round(counters.acceptance_length, 3),
            "waits": sorted(set(answers.waits) - set(plain.waits)),
            "answer_s": {"plain": round(plain.seconds, 3), "layerskip": round(answers.seconds, 3)},
            "problems": faults(facts, self.args.dtype, *self._expected(variant)),
        }

    def _expected(self, variant: str) -> tuple[set[str], set[str]]:
        """What must happen and what must not."""
        graphs = {"draft", "verify"} if self.on_gpu else set()
        without = {
            WITHOUT_REUSE: {"reuse"},
            DRAFTS_WITHOUT_GRAPHS: {"draft"},
            EAGER: {"draft", "verify"},
        }.get(variant, set())
        return ({"reuse"} | graphs) - without, without

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(embedded_checkpoint()))
    parser.add_argument("--dtype", choices=sorted(ROUNDING), default="float32")
    parser.add_argument("--exit-layer", type=int, default=3, help="E")
    parser.add_argument("--num-speculative-tokens", type=int, default=5, help="K")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--variant", choices=VARIANTS, help="This one engine alone.")
    parser.add_argument("--output", type=Path, required=True, help="Result file.")
    args = parser.parse_args()
    args.output.unlink(missing_ok=True)  # An older one must not pass for this run's.
    prepare_environment()
    check = Check(args)
    plain = check.run_plain()
    result: dict[str, Any] = {
        "dtype": args.dtype,
        "checks": [],
        "arguments": {key: value for key, value in check.arguments.items() if key != "model"},
        "speculative_config": check.request,
        "provenance": provenance(),
    }
    wanted = [AS_SERVED] if args.dtype == "float32" else [AS_SERVED, WITHOUT_REUSE]
    for variant in [args.variant] if args.variant else wanted:
        _add(result, args.output, _run(check, variant, plain))
    if any(one["problems"] for one in result["checks"]):
        if not args.variant:
            _narrow_down(result, args.output, VARIANTS if check.on_gpu else VARIANTS[:2])
        sys.exit(1)


def _run(check: Check, variant: str, plain: Answers) -> dict[str, Any]:
    try:
        return check.run(variant, plain)
    except Exception as error:
        traceback.print_exc()
        return {"variant": variant, "problems": [f"{type(error).__name__}: {error}"[:300]]}


def _add(result: dict[str, Any], output: Path, one: dict[str, Any]) -> None:
    result["checks"].append(one)
    write_json(output, result)
    print(_line(one, result["dtype"]), flush=True)


def _narrow_down(result: dict[str, Any], output: Path, variants: Sequence[str]) -> None:
    """Run the variants that did not run yet, each in a process of its own."""
    done = {one["variant"] for one in result["checks"]}
    for variant in variants:
        if variant in done:
            continue
        apart = output.with_suffix(".variant")
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.check_graphs",
            *sys.argv[1:],
            "--variant",
            variant,
            "--output",
            str(apart),
        ]
        subprocess.run(command, check=False)
        one = {"variant": variant, "problems": ["its process ended without a result"]}
        if apart.exists():
            (one,) = json.loads(apart.read_text(encoding="utf-8"))["checks"]
            apart.unlink()
        _add(result, output, one)


def describe(result: dict[str, Any]) -> str:
    """A result, one line for each engine."""
    return "\n".join(_line(one, result["dtype"]) for one in result["checks"])


def _line(one: dict[str, Any], dtype: str) -> str:
    problems = "".join(f"; FAULT: {problem}" for problem in one["problems"])
    if "num_answers" not in one:
        return f"{one['variant']}: no answer{problems}"
    replays = ", ".join(f"{kind} {count}" for kind, count in one["num_replays"].items())
    text = (
        f"{one['variant']}: {one['num_equal']} of {one['num_answers']} answers equal plain "
        f"decoding's in {dtype}; acceptance length {one['acceptance_length']:.2f}; verify steps "
        f"reused {one['num_reused']}, full {one['num_full']}; graphs replayed: {replays or 'none'}"
    )
    gaps = [None if each["gap"] is None else round(each["gap"], 5) for each in one["differences"]]
    if gaps:
        text += f"; log-probability gaps where they differ: {gaps}"
    if one["waits"]:
        text += f"; waits for the GPU that plain decoding does not have: {one['waits']}"
    return text + problems


if __name__ == "__main__":
    main()
