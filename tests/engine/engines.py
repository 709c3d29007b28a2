# SPDX-License-Identifier: Apache-2.0
"""Engines for tests: one per setting, in this process, with exact counts of their drafts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform

from vllm_layerskip.metrics.step_counts import StepCounts

ON_GPU = torch.cuda.is_available()

ENGINE_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    # On a GPU everything that vLLM does by default, with an attention that takes float32.
    "enforce_eager": not ON_GPU,
    **({"attention_backend": "TRITON_ATTN"} if ON_GPU else {}),
    # The KV cache's size is given. This share must be free, and a pool keeps several engines.
    **({"gpu_memory_utilization": 0.3} if ON_GPU else {}),
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 16 << 20,
    "disable_log_stats": False,
    "seed": 0,
    # vLLM's default is True on a GPU; tests about it ask for it on a CPU, too.
    "async_scheduling": None if ON_GPU else False,
}


@dataclass
class SpecCounts:
    """What one engine drafted, accepted and verified over a block of code.

    Taken from the scheduler itself: vLLM's Prometheus counters belong to the process, and
    a test process has many engines.
    """

    num_speculative_tokens: int
    drafts: list[tuple[int, int]] = field(default_factory=list)
    """(drafted, accepted) of each request and step; without drafts that a grammar forbids."""
    request_ids: list[str] = field(default_factory=list)
    """Whose drafts they were: the caller's id with vLLM's suffix."""
    num_invalid_drafts: int = 0
    """Drafts that a grammar forbids, and that were verified (async scheduling)."""
    num_verify_steps_reused: int = 0
    num_verify_steps_full: int = 0
    preempted: list[str] = field(default_factory=list)
    """Ids of preempted requests, in order."""

    @property
    def num_preemptions(self) -> int:
        return len(self.preempted)

    @property
    def num_drafts(self) -> int:
        return len(self.drafts)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(accepted for _, accepted in self.drafts)

    @property
    def num_draft_tokens(self) -> int:
        return sum(drafted for drafted, _ in self.drafts)

    @property
    def acceptance_length(self) -> float:
        return 1 + self.num_accepted_tokens / self.num_drafts

    @property
    def accepted_per_position(self) -> list[int]:
        return [
            sum(accepted > position for _, accepted in self.drafts)
            for position in range(self.num_speculative_tokens)
        ]

    def of_request(self, request_id: str) -> list[tuple[int, int]]:
        return [
            draft
            for owner, draft in zip(self.request_ids, self.drafts, strict=True)
            if owner.rsplit("-", 1)[0] == request_id
        ]

    def assert_speculated(self) -> None:
        """Equal tokens mean nothing unless something was drafted and accepted."""
        assert self.num_drafts > 0
        assert 0 < self.num_accepted_tokens <= self.num_draft_tokens


@contextlib.contextmanager
def async_scheduling_as_asked() -> Iterator[None]:
    """Let an engine on a CPU have ``async_scheduling=True``, the default on a GPU.

    vLLM's CPU platform always turns it off, because a CPU gains nothing by it. All of it runs
    there nonetheless: the scheduler plans a step before it knows the tokens of the one before.
    What a CPU cannot show is a step that really overlaps another.
    """
    platform = type(current_platform)
    apply = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        apply(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    if ON_GPU:
        yield
        return
    with mock.patch.object(
        platform, "check_and_update_config", staticmethod(check_and_update_config)
    ):
        yield


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Leave out the full collections that vLLM makes at an engine's start and end.

    Each takes seconds in a test process, whose heap holds vLLM, transformers and torch, and frees
    nothing that automatic ones do not free. On a GPU memory must be free at once.
    """
    if ON_GPU:
        yield
        return
    with mock.patch.object(gc, "collect", return_value=0):
        yield


class Engine:
    """An ``LLM`` of the test process."""

    def __init__(self, model: str, **settings: Any) -> None:
        if not (Path(model) / "tokenizer.json").exists():
            settings.setdefault("skip_tokenizer_init", True)
        with async_scheduling_as_asked(), no_collections():
            self.llm = LLM(model, **{**ENGINE_DEFAULTS, **settings})

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def vllm_config(self) -> Any:
        return self.llm.llm_engine.vllm_config

    @property
    def runner(self) -> Any:
        return self.llm.collective_rpc(lambda worker: worker.model_runner)[0]

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[int]]:
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def greedy(self, prompts: Sequence[list[int]], max_tokens: int = 40, **kwargs: Any):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **kwargs)
        return self.generate(prompts, params)

    @contextlib.contextmanager
    def counting(self) -> Iterator[SpecCounts]:
        """Counts of what the block does; complete when it ends."""
        scheduler = self.scheduler
        counts = SpecCounts(self.vllm_config.num_speculative_tokens)
        observe, preempt = scheduler.make_spec_decoding_stats, scheduler._preempt_request

        def make_spec_decoding_stats(stats: Any, **kwargs: Any) -> Any:
            invalid = (kwargs["num_invalid_spec_tokens"] or {}).get(kwargs["request_id"], 0)
            drafted = kwargs["num_draft_tokens"] - invalid
            counts.drafts.append((drafted, kwargs["num_accepted_tokens"]))
            counts.request_ids.append(kwargs["request_id"])
            counts.num_invalid_drafts += invalid
            return observe(stats, **kwargs)

        def preempt_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            counts.preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        scheduler.make_spec_decoding_stats = make_spec_decoding_stats
        scheduler._preempt_request = preempt_request
        before = self.verify_stats()
        try:
            yield counts
        finally:
            del scheduler.make_spec_decoding_stats, scheduler._preempt_request
            after = self.verify_stats()
            for name, value in after.since(before)._asdict().items():
                setattr(counts, name, value)

    def verify_stats(self) -> StepCounts:
        if self.vllm_config.speculative_config is None:
            return StepCounts()
        return self.llm.collective_rpc(_step_counts)[0]

    def start(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        priority: int = 0,
        **kwargs: Any,
    ) -> None:
        """Add a greedy request; drive it with ``step``."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **kwargs)
        self.llm.llm_engine.add_request(
            request_id, TokensPrompt(prompt_token_ids=list(prompt)), params, priority=priority
        )

    def step(self) -> dict[str, list[int]]:
        """One engine step: the tokens so far of each request that got any."""
        outputs = self.llm.llm_engine.step()
        return {output.request_id: list(output.outputs[0].token_ids) for output in outputs}

    def run_to_end(self) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            tokens.update(self.step())
        return tokens

    def abort(self, request_id: str) -> None:
        self.llm.llm_engine.abort_request([request_id])

    def reset_prefix_cache(self) -> None:
        assert self.llm.reset_prefix_cache()

    def close(self, collect: bool = True) -> None:
        with no_collections():
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if collect:
            gc.collect()


class RecordedInputs:
    """Records token ids of an engine's forwards and draft passes in a block (no CUDA graphs)."""

    def __init__(self, engine: Engine) -> None:
        self.model = engine.runner.model
        self.vocab_size = engine.vllm_config.model_config.get_vocab_size()
        self.of_forwards: list[torch.Tensor] = []
        self.of_early_stages: list[torch.Tensor] = []
        """Draft passes, and the early part of each forward."""

    def __enter__(self) -> RecordedInputs:
        self._record("forward", self.of_forwards)
        self._record("run_early_stage", self.of_early_stages)
        return self

    def __exit__(self, *exc: object) -> None:
        del self.model.forward, self.model.run_early_stage

    def _record(self, name: str, seen: list[torch.Tensor]) -> None:
        original = getattr(self.model, name)

        def recording(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(input_ids.clone())
            return original(input_ids, *args, **kwargs)

        setattr(self.model, name, recording)

    def assert_token_ids(self) -> None:
        assert len(self.of_early_stages) > len(self.of_forwards) > 0
        for input_ids in (*self.of_forwards, *self.of_early_stages):
            assert 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.vocab_size


class EnginePool:
    """Keeps engines by their settings, so that tests of one setting share one start."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}

    def get(self, model: object, **settings: Any) -> Engine:
        key = repr((str(model), sorted(settings.items(), key=lambda item: item[0])))
        if key not in self._engines:
            # vLLM draws its request seeds from the process's generators.
            torch.manual_seed(0)
            self._engines[key] = Engine(str(model), **settings)
        return self._engines[key]

    def layerskip(
        self, model: object, exit_layer: int, num_speculative_tokens: int, **settings: Any
    ) -> Engine:
        spec = {
            "method": "layerskip",
            "exit_layer": exit_layer,
            "num_speculative_tokens": num_speculative_tokens,
            **settings.pop("spec", {}),
        }
        return self.get(model, speculative_config=spec, **settings)

    def __len__(self) -> int:
        return len(self._engines)

    def close(self) -> None:
        # A collection of this heap takes seconds, so there is one for all of them.
        for engine in self._engines.values():
            engine.close(collect=False)
        self._engines.clear()
        gc.collect()


def _step_counts(worker: Any) -> StepCounts:
    return worker.model_runner.model_state.step_counts
