# SPDX-License-Identifier: Apache-2.0
"""Many random requests through one engine: every greedy answer is plain vLLM's, nothing is left
behind, and memory stays flat.

Catches what only a mixture shows: slots and blocks that change hands between drafting and
verification, batch-size schedules that switch drafting off and on, preempted and aborted
requests, answers that end inside of a draft. The long version:

    python -m pytest -m slow tests/engine/exactness/test_soak.py
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from checkpoints import random_llama
from engines import Engine
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

VOCAB_SIZE, EOS = 64, 1
MAX_MODEL_LEN, MAX_NUM_SEQS = 96, 8
SETTINGS: dict[str, Any] = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": MAX_NUM_SEQS,
    "block_size": 32,
}
# Long prompts come in chunks, blocks run out, and a full batch drafts nothing.
TIGHT = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 14}
SCHEDULE = [(1, 1, 5), (2, 3, 3), (4, 6, 1), (7, MAX_NUM_SEQS, 0)]
MEMORY_MARGIN_BYTES = 24 << 20


@dataclass(frozen=True)
class SoakRequest:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    abort_after: int | None
    """Number of its tokens after which its client goes away."""

    @property
    def comparable(self) -> bool:
        """Sampled tokens follow the same distribution, not the same draws."""
        return self.params.temperature == 0


def random_requests(num_requests: int, rng: random.Random) -> Iterator[SoakRequest]:
    shared = [[0, *rng.choices(range(3, VOCAB_SIZE), k=47)] for _ in range(4)]
    for index in range(num_requests):
        prompt = list(rng.choice(shared)[: rng.randrange(48)]) if rng.random() < 0.5 else [0]
        prompt += rng.choices(range(3, VOCAB_SIZE), k=rng.randrange(1, 30))
        if rng.random() < 0.06:
            max_tokens = MAX_MODEL_LEN - len(prompt)  # Ends on the model's last position.
        else:
            max_tokens = min(rng.randrange(1, 40), MAX_MODEL_LEN - len(prompt))
        yield SoakRequest(
            f"soak-{index}",
            prompt,
            random_params(max_tokens, rng),
            abort_after=rng.randrange(12) if rng.random() < 0.08 else None,
        )


def random_params(max_tokens: int, rng: random.Random) -> SamplingParams:
    settings: dict[str, Any] = {"temperature": 0, "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.1:
        settings |= {"temperature": rng.uniform(0.3, 1.5), "seed": rng.randrange(1 << 30)}
        settings |= rng.choice([{}, {"top_k": 10}, {"top_p": 0.8}])
    if rng.random() < 0.2:
        settings["min_tokens"] = rng.randrange(max_tokens + 1)
    if rng.random() < 0.2:
        settings["stop_token_ids"] = rng.sample(range(3, VOCAB_SIZE), k=3)
    if rng.random() < 0.15:
        settings |= {
            "repetition_penalty": rng.uniform(1.0, 1.5),
            "presence_penalty": rng.uniform(-0.5, 1.0),
            "frequency_penalty": rng.uniform(-0.5, 1.0),
        }
    if rng.random() < 0.1:
        settings["allowed_token_ids"] = [EOS, *rng.sample(range(3, VOCAB_SIZE), k=20)]
    if rng.random() < 0.1:
        settings["logprobs"] = rng.randrange(3)
    return SamplingParams(max_tokens=max_tokens, **settings)


@dataclass
class SoakResult:
    answers: dict[str, tuple[list[int], str | None]]
    """Tokens and finish reason (None: aborted) by request."""
    num_aborted: int
    rss_after_warm_up: int
    rss_at_end: int


def soak(engine: Engine, requests: list[SoakRequest], rng: random.Random) -> SoakResult:
    """Feed the engine in bursts and lulls, so that batches of every size occur."""
    llm_engine = engine.llm.llm_engine
    waiting, running = list(reversed(requests)), {}
    answers: dict[str, tuple[list[int], str | None]] = {}
    num_aborted, rss_after_warm_up = 0, 0
    while waiting or running:
        burst = rng.choice((0, 0, 0, 0, 0, 1, 1, 1, 2, MAX_NUM_SEQS + 3)) if running else 1
        for _ in range(min(burst, len(waiting), 2 * MAX_NUM_SEQS - len(running))):
            request = waiting.pop()
            running[request.request_id] = request
            prompt = TokensPrompt(prompt_token_ids=request.prompt)
            llm_engine.add_request(request.request_id, prompt, request.params.clone())
        for output in llm_engine.step():
            request, tokens = running[output.request_id], list(output.outputs[0].token_ids)
            answers[output.request_id] = tokens, output.outputs[0].finish_reason
            if output.finished:
                del running[output.request_id]
            elif request.abort_after is not None and len(tokens) >= request.abort_after:
                llm_engine.abort_request([output.request_id])
                del running[output.request_id]
                num_aborted += 1
        if rss_after_warm_up == 0 and len(waiting) < 0.7 * len(requests):
            rss_after_warm_up = resident_bytes()
    return SoakResult(answers, num_aborted, rss_after_warm_up, resident_bytes())


def resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def plain_answers(
    engine: Engine, requests: list[SoakRequest]
) -> dict[str, tuple[list[int], str | None]]:
    outputs = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=request.prompt) for request in requests],
        [request.params.clone() for request in requests],
        use_tqdm=False,
    )
    return {
        request.request_id: (list(output.outputs[0].token_ids), output.outputs[0].finish_reason)
        for request, output in zip(requests, outputs, strict=True)
    }


def mismatches(
    requests: list[SoakRequest],
    answers: dict[str, tuple[list[int], str | None]],
    expected: dict[str, tuple[list[int], str | None]],
) -> list[str]:
    """Requests whose tokens or finish reasons differ; an aborted one has the first tokens."""
    wrong = []
    for request in requests:
        tokens, reason = answers[request.request_id]
        wanted, wanted_reason = expected[request.request_id]
        if reason is None:
            wanted, wanted_reason = wanted[: len(tokens)], None
        if (tokens, reason) != (wanted, wanted_reason):
            wrong.append(f"{request}: {tokens}, {reason}; plain vLLM: {wanted}, {wanted_reason}")
    return wrong


def assert_nothing_left(engine: Engine) -> None:
    scheduler, states = engine.scheduler, engine.runner.req_states
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    assert not engine.llm.llm_engine.output_processor.request_states
    assert scheduler.kv_cache_manager.usage == 0
    engine.step()  # Workers hear of finished requests with the next step.
    assert not states.req_id_to_index
    assert sorted(states.free_indices) == list(range(MAX_NUM_SEQS))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights; the first half of the layers predicts about half of the tokens."""
    return random_llama(
        tmp_path_factory.mktemp("soak") / "model", late_from=2, late_gain=0.35, seed=3
    )


@pytest.mark.parametrize(
    ("num_requests", "seed"),
    [
        (150, 0),
        pytest.param(2200, 1, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
    ids=["short", "long"],
)
def test_random_requests_get_plain_vllms_tokens(pool, model, num_requests, seed):
    rng = random.Random(seed)
    requests = list(random_requests(num_requests, rng))
    comparable = [request for request in requests if request.comparable]
    expected = plain_answers(pool.get(model, **SETTINGS), comparable)

    torch.manual_seed(seed)
    engine = pool.layerskip(
        model, 2, 5, spec={"num_speculative_tokens_per_batch_size": SCHEDULE}, **SETTINGS, **TIGHT
    )
    with engine.counting() as counts:
        result = soak(engine, requests, rng)

    assert mismatches(comparable, result.answers, expected) == []
    for request in requests:
        tokens, _ = result.answers[request.request_id]
        assert len(tokens) <= request.params.max_tokens
        assert all(0 <= token < VOCAB_SIZE for token in tokens)
    assert_nothing_left(engine)

    # Each kind of event that may go wrong did happen.
    assert result.num_aborted >= num_requests // 50
    assert counts.num_preemptions >= num_requests // 50
    counts.assert_speculated()
    assert counts.num_draft_tokens > counts.num_accepted_tokens * 1.3
    assert counts.num_accepted_tokens > counts.num_draft_tokens * 0.2
    assert {drafted for drafted, _ in counts.drafts} >= {1, 3, 5}
    assert counts.num_verify_steps_reused > num_requests // 4
    assert counts.num_verify_steps_full > num_requests // 4
    print(
        f"\n{len(comparable)} of {num_requests} requests compared, {result.num_aborted} aborted, "
        f"{counts.num_preemptions} preemptions, acceptance {counts.acceptance_length:.2f}, "
        f"verify steps {counts.num_verify_steps_reused} reused {counts.num_verify_steps_full} "
        f"full, RSS {result.rss_after_warm_up >> 20} -> {result.rss_at_end >> 20} MiB"
    )
    assert result.rss_at_end - result.rss_after_warm_up < MEMORY_MARGIN_BYTES
