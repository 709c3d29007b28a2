# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM against LayerSkip on the embedded checkpoint (`make demo`).

Prompts are lines out of standard-library modules that the checkpoint never saw. Each is
answered by plain vLLM and by LayerSkip with greedy sampling; then a table compares them.
What vLLM writes goes to a log.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

# One process, so that the numbers measure the engine and not its start.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.counters import SpecDecodeCounters, read_counters
from vllm_layerskip.files.corpus import held_out_prompts, load_stdlib

if TYPE_CHECKING:
    from vllm import LLM

START = time.perf_counter()
NUM_LOG_LINES = 15
"""Of the log's end, where the demo fails."""


@dataclass
class Answer:
    text: str
    token_ids: list[int]
    seconds: float
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
    console.print(f"[{time.perf_counter() - START:4.0f} s] {phase}", markup=False, highlight=False)


def start_engine(args: argparse.Namespace, speculative_config: dict | None) -> LLM:
    from vllm import LLM
    from vllm.platforms import current_platform

    return LLM(
        args.model,
        # float32 gives exact equality; GPUs run the checkpoint as it is stored.
        dtype="float32" if current_platform.is_cpu() else "auto",
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=current_platform.is_cpu(),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.3,  # Must be free on a GPU; the KV cache has its own size.
        disable_log_stats=False,
        speculative_config=speculative_config,
    )


def answer_all(
    llm: LLM, prompts: list[str], max_tokens: int, console: Console, name: str
) -> list[Answer]:
    """One prompt after the other, so that each has its own time and counters."""
    from vllm import SamplingParams

    speculative = llm.llm_engine.vllm_config.speculative_config is not None
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    # A whole answer that does not count: what is made at first use is made then.
    llm.generate(prompts[-1:], params, use_tqdm=False)
    answers = []
    for prompt in track(prompts, description=name, console=console):
        before = read_counters(llm) if speculative else None
        start = time.perf_counter()
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        completion = output.outputs[0]
        counters = read_counters(llm) - before if before is not None else None
        answers.append(Answer(completion.text, list(completion.token_ids), seconds, counters))
    return answers


def show_answer(console: Console, module: str, prompt: str, plain: Answer, skip: Answer) -> None:
    tail = "\n".join(prompt.splitlines()[-6:])
    text = Text(tail, style="dim") + Text(skip.text)
    console.print(Panel(text, title=f"{module} (dim: end of the prompt)"))
    if plain.token_ids != skip.token_ids:
        console.print(Panel(Text(plain.text), title="plain vLLM differs", style="red"))


def comparison(prompts: list[tuple[str, str]], plain: list[Answer], skip: list[Answer]) -> Table:
    table = Table(title="Plain vLLM and LayerSkip, greedy, batch size 1")
    for column in (
        "held-out module",
        "tokens equal",
        "acceptance length",
        "acceptance by position",
        "verify steps reused / all",
        "plain tok/s",
        "LayerSkip tok/s",
    ):
        if column == "held-out module":
            table.add_column(column)
        else:
            table.add_column(column, justify="right", no_wrap=column == "acceptance by position")
    for (module, _), one, other in zip(prompts, plain, skip, strict=True):
        counters = other.counters
        assert counters is not None
        num_verify_steps = counters.num_verify_steps_reused + counters.num_verify_steps_full
        table.add_row(
            module,
            "yes" if one.token_ids == other.token_ids else "NO",
            f"{counters.acceptance_length:.2f}",
            " ".join(f"{rate:.0%}" for rate in counters.acceptance_rates),
            f"{counters.num_verify_steps_reused} / {num_verify_steps}",
            f"{one.tokens_per_second:.1f}",
            f"{other.tokens_per_second:.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(embedded_checkpoint()))
    parser.add_argument("--exit-layer", default="auto")
    parser.add_argument("--num-speculative-tokens", type=int, default=None)
    parser.add_argument("--num-prompts", type=int, default=6)
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
        accepted = compare(args, console)
    except Exception:
        traceback.print_exc()  # Into the log.
        sys.stderr.flush()
        end = args.log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LOG_LINES:]
        console.print("\n".join(end), markup=False, highlight=False, soft_wrap=True)
        say(console, f"The demo failed. Its whole log: {args.log}")
        sys.exit(1)
    say(console, f"Done. What vLLM wrote is in {args.log}")
    if not accepted:
        console.print("No draft was accepted: LayerSkip is not at work.")
        sys.exit(1)


def compare(args: argparse.Namespace, console: Console) -> bool:
    """Answer all prompts both ways and show both; whether a draft was accepted."""
    prompts = held_out_prompts(load_stdlib(), args.num_prompts)
    texts = [text for _, text in prompts]
    exit_layer = args.exit_layer if args.exit_layer == "auto" else int(args.exit_layer)
    request = {"method": "layerskip", "exit_layer": exit_layer}
    if args.num_speculative_tokens is not None:
        request["num_speculative_tokens"] = args.num_speculative_tokens

    say(console, "Starting plain vLLM")
    llm = start_engine(args, None)
    say(console, f"Answering {len(texts)} prompts, after one to warm up")
    plain = answer_all(llm, texts, args.max_tokens, console, "plain vLLM")
    llm.llm_engine.engine_core.shutdown()
    del llm
    say(console, "Starting vLLM with LayerSkip")
    llm = start_engine(args, request)
    say(console, f"Answering {len(texts)} prompts, after one to warm up")
    config = llm.llm_engine.vllm_config.speculative_config
    skip = answer_all(llm, texts, args.max_tokens, console, "LayerSkip")
    for (module, prompt), one, other in zip(prompts, plain, skip, strict=True):
        show_answer(console, module, prompt, one, other)
    console.print(comparison(prompts, plain, skip))
    from vllm.platforms import current_platform

    console.print(f"{config!r} on {current_platform.device_name or current_platform.device_type}")
    if current_platform.is_cpu():
        console.print(
            "On a CPU tokens and acceptance are real; the ratio of the two speeds is mostly "
            "Python's, and says nothing of a GPU. See docs/gpu.md."
        )
    same = sum(a.token_ids == b.token_ids for a, b in zip(plain, skip, strict=True))
    console.print(f"{same} of {len(prompts)} answers have exactly plain vLLM's tokens.")
    return any(answer.counters and answer.counters.num_accepted_tokens for answer in skip)


if __name__ == "__main__":
    main()
