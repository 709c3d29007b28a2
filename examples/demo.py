# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM against LayerSkip on the embedded checkpoint (`make demo`).

Prompts are lines out of standard-library modules that the checkpoint never saw. Each is
answered by plain vLLM and by LayerSkip with greedy sampling; then a table compares them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass

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
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from vllm_layerskip import embedded_checkpoint
from vllm_layerskip.counters import SpecDecodeCounters, read_counters
from vllm_layerskip.files.corpus import held_out_prompts, load_stdlib


@dataclass
class Answer:
    text: str
    token_ids: list[int]
    seconds: float
    counters: SpecDecodeCounters | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


def start_engine(args: argparse.Namespace, speculative_config: dict | None) -> LLM:
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
    speculative = llm.llm_engine.vllm_config.speculative_config is not None
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
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
    args = parser.parse_args()

    console = Console(width=120)
    prompts = held_out_prompts(load_stdlib(), args.num_prompts)
    texts = [text for _, text in prompts]
    exit_layer = args.exit_layer if args.exit_layer == "auto" else int(args.exit_layer)
    request = {"method": "layerskip", "exit_layer": exit_layer}
    if args.num_speculative_tokens is not None:
        request["num_speculative_tokens"] = args.num_speculative_tokens

    console.print("Starting plain vLLM ...")
    llm = start_engine(args, None)
    plain = answer_all(llm, texts, args.max_tokens, console, "plain vLLM")
    llm.llm_engine.engine_core.shutdown()
    del llm
    console.print("Starting vLLM with LayerSkip ...")
    llm = start_engine(args, request)
    config = llm.llm_engine.vllm_config.speculative_config
    skip = answer_all(llm, texts, args.max_tokens, console, "LayerSkip")
    for (module, prompt), one, other in zip(prompts, plain, skip, strict=True):
        show_answer(console, module, prompt, one, other)
    console.print(comparison(prompts, plain, skip))
    console.print(f"{config!r} on {current_platform.device_name or current_platform.device_type}")
    if current_platform.is_cpu():
        console.print(
            "On a CPU tokens and acceptance are real; the ratio of the two speeds is mostly "
            "Python's, and says nothing of a GPU. See docs/gpu.md."
        )
    same = sum(a.token_ids == b.token_ids for a, b in zip(plain, skip, strict=True))
    console.print(f"{same} of {len(prompts)} answers have exactly plain vLLM's tokens.")
    if not any(answer.counters and answer.counters.num_accepted_tokens for answer in skip):
        sys.exit("No draft was accepted: LayerSkip is not at work.")


if __name__ == "__main__":
    main()
