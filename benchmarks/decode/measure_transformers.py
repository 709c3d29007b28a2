# SPDX-License-Identifier: Apache-2.0
"""transformers' own ``generate``, plain and with ``assistant_early_exit``: batch 1, no vLLM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode.prompts import make_prompts
from benchmarks.decode.runs import Clock, Emit, summarise
from benchmarks.engines.settings import DecodeCell, Settings
from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring.timing import Window


class _StepClock:
    """A streamer that notes when tokens came: ``put`` gets the prompt once, then each step's."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.num_tokens: list[int] = []

    def put(self, token_ids: Any) -> None:
        self.times.append(time.perf_counter())
        self.num_tokens.append(token_ids.numel())

    def end(self) -> None:
        pass

    def window(self) -> Window:
        """From the first token, which prefill gives, to the last step but one."""
        times, num_tokens = self.times[1:-1], self.num_tokens[1:-1]
        if len(times) < 2:
            raise ValueError("Too few steps to time: raise --output-len.")
        return Window(times[-1] - times[0], sum(num_tokens[1:]), len(times) - 1)


def measure_transformers(
    settings: Settings, mode: str, cells: Sequence[DecodeCell], clock: Clock, emit: Emit
) -> None:
    """Measure the cells of batch 1.

    Raises:
        UserError: there is no checkpoint, and transformers cannot set the acceptance of a shape.
    """
    if settings.model is None:
        raise UserError(
            f"--mode={mode} needs --model: transformers verifies drafts for real, and dummy "
            "weights have no acceptance to speak of."
        )
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=getattr(torch, settings.dtype)
    )
    model = model.to(settings.device).eval()
    engine = {"start_s": round(time.perf_counter() - start, 2)}
    for cell in cells:
        if cell.batch_size != 1:
            continue
        common = cell._asdict() | {"engine": engine}
        if not clock.has_time():
            emit(common | {"status": "no-time", "reason": f"limit of {clock.limit_s} s"})
            continue
        begin = time.perf_counter()
        prompts = make_prompts(
            settings.prompts, 1, cell.prompt_len, model.config.vocab_size, Path(settings.model)
        )
        input_ids = torch.tensor(prompts, device=settings.device)
        emit(common | {"status": "ok"} | _measure_prompt(model, settings, mode, input_ids))
        clock.observe(time.perf_counter() - begin)


def _measure_prompt(model: Any, settings: Settings, mode: str, input_ids: Any) -> dict[str, Any]:
    """Warm up, then generate ``repeats`` times."""
    _generate(model, settings, mode, input_ids)
    windows = [_generate(model, settings, mode, input_ids) for _ in range(settings.repeats)]
    tokens, steps = (sum(getattr(w, name) for w in windows) for name in ("num_tokens", "num_steps"))
    speculation = {"acceptance_length": round(tokens / steps, 4)} if "-" in mode else None
    return summarise(windows) | {"speculation": speculation}


def _generate(model: Any, settings: Settings, mode: str, input_ids: Any) -> Window:
    import torch
    from transformers import GenerationConfig

    generation = GenerationConfig(
        max_new_tokens=settings.output_len,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    if mode == "transformers-assistant":
        generation.assistant_early_exit = settings.exit_layer
        # The assistant reads its own model's config. The same K at every step, as vLLM drafts:
        # no schedule, no stop at low confidence.
        model.generation_config.num_assistant_tokens = settings.num_speculative_tokens
        model.generation_config.num_assistant_tokens_schedule = "constant"
        model.generation_config.assistant_confidence_threshold = 0.0
        model.generation_config.use_cache = True
    streamer = _StepClock()
    with torch.inference_mode():
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation,
            streamer=streamer,
        )
    return streamer.window()
