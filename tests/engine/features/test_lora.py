# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters mixed in one batch: each row of a draft gets its request's adapter.

Catches (docs/tests.md, T16) a verify step with another row's adapter, by its tokens, and a draft
pass with one, by its acceptance: verification with LoRA writes every draft's K/V again.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from adapters import ALL_MODULES, LAYER_MODULES, random_adapter
from checkpoints import random_llama
from engines import ON_GPU
from families import random_checkpoint
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

pytestmark = [pytest.mark.gpu] if ON_GPU else []

# One slot more than adapters: vLLM's CPU kernels index the last slot for rows without one.
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
if ON_GPU:  # Its LoRA kernels take no float32.
    LORA |= {"dtype": "bfloat16", "attention_backend": None, "max_num_batched_tokens": 2048}


def make_adapters(checkpoint: Path, folder: Path, modules: dict, gain: float) -> list[LoRARequest]:
    return [
        LoRARequest(
            name, number, str(random_adapter(checkpoint, folder / name, targets, number, gain))
        )
        for number, (name, targets) in enumerate(modules.items(), start=1)
    ]


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory):
    """One adapts the layers alone, one embedding and LM head as well."""
    modules = {"layers": LAYER_MODULES, "all": ALL_MODULES}
    return make_adapters(checkpoint, tmp_path_factory.mktemp("adapters"), modules, gain=0.05)


def generate(engine, requests):
    """Greedy tokens of ``(prompt, adapter or None, max_tokens)``, as one call."""
    outputs = engine.llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt, _, _ in requests],
        [
            SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            for *_, max_tokens in requests
        ],
        lora_request=[adapter for _, adapter, _ in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.skipif(ON_GPU, reason="tokens of bfloat16 depend on batch shapes")
def test_adapters_and_base_mixed_in_one_batch(pool, checkpoint, prompts, adapters):
    plain = pool.get(checkpoint, **LORA)
    # Twelve requests for four places: rows of all three come and go, and slots change hands.
    requests = [
        (prompt, adapter, 16 + 9 * number)
        for number, prompt in enumerate(prompts[:4])
        for adapter in (None, *adapters)
    ]
    expected = [generate(plain, [request])[0] for request in requests]
    for first in range(0, len(requests), 3):
        base, *adapted = expected[first : first + 3]
        assert all(tokens != base for tokens in adapted), "the adapter changes nothing"
    ours = pool.layerskip(checkpoint, 3, 4, **LORA)
    for seed in range(2):
        order = random.Random(seed).sample(range(len(requests)), len(requests))
        with ours.counting() as counts:
            tokens = generate(ours, [requests[i] for i in order])
        assert tokens == [expected[i] for i in order]
        counts.assert_speculated()
        assert counts.num_verify_steps_reused == 0


CHANGES = {
    "load another": lambda llm, first, second: llm.add_lora(second),
    "unload": lambda llm, first, second: llm.remove_lora(first.lora_int_id),
    "pin": lambda llm, first, second: llm.pin_lora(first.lora_int_id),
    "load another in its place": lambda llm, first, second: llm.add_lora(
        LoRARequest(first.lora_name, first.lora_int_id, second.lora_path, load_inplace=True)
    ),
    "reload the base model": lambda llm, first, second: llm.collective_rpc("reload_weights"),
}


@pytest.mark.skipif(ON_GPU, reason="tokens of bfloat16 depend on batch shapes")
@pytest.mark.parametrize("change", CHANGES)
def test_adapters_that_change_in_flight(pool, checkpoint, prompts, adapters, change):
    """A request goes on as plain vLLM's does, after the same number of tokens."""

    def run(engine, num_tokens):
        llm_engine = engine.llm.llm_engine
        for adapter in adapters:
            llm_engine.remove_lora(adapter.lora_int_id)
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        inputs = TokensPrompt(prompt_token_ids=prompts[0])
        llm_engine.add_request("request", inputs, params, lora_request=adapters[0])
        tokens = []
        while len(tokens) < num_tokens:
            tokens = engine.step().get("request", tokens)
        CHANGES[change](llm_engine, *adapters)
        after = engine.run_to_end()["request"]
        assert after[: len(tokens)] == tokens
        return len(tokens), after

    settings = LORA | {"enable_prefix_caching": False}
    ours = pool.layerskip(checkpoint, 3, 4, **settings)
    with ours.counting() as counts:
        num_tokens, tokens = run(ours, 9)
    counts.assert_speculated()
    assert run(pool.get(checkpoint, **settings), num_tokens) == (num_tokens, tokens)


@pytest.mark.skipif(ON_GPU, reason="tokens of bfloat16 depend on batch shapes")
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Gemma2ForCausalLM"])
def test_adapters_of_other_families(pool, tmp_path, architecture):
    """Gemma 2 uses its embedding as LM head."""
    checkpoint = random_checkpoint(tmp_path / "model", architecture)
    modules = {"one": LAYER_MODULES, "two": LAYER_MODULES}
    adapters = make_adapters(checkpoint, tmp_path, modules, gain=0.1)
    requests = [
        ([0, *range(3, 3 + length)], adapter, 24)
        for length in (4, 21)
        for adapter in (None, *adapters)
    ]
    plain = pool.get(checkpoint, **LORA)
    expected = [generate(plain, [request])[0] for request in requests]
    for base, *adapted in (expected[:3], expected[3:]):
        assert all(tokens != base for tokens in adapted), "the adapter changes nothing"
    ours = pool.layerskip(checkpoint, 2, 3, **LORA)
    with ours.counting() as counts:
        assert generate(ours, requests) == expected
    counts.assert_speculated()


def test_drafts_and_verification_have_the_same_adapter(pool, tmp_path):
    """Late layers add nothing and adapters touch the early ones: all drafts are accepted."""
    checkpoint = random_llama(tmp_path / "model", identity_from=2)
    early = r".*layers\.[01]\..*_proj|.*embed_tokens|.*lm_head"
    adapters = make_adapters(checkpoint, tmp_path, {"one": early, "two": early}, gain=0.2)
    engine = pool.layerskip(checkpoint, 2, 3, **LORA)
    prompts = [[0, *range(3, 3 + length)] for length in (4, 21)]
    requests = [
        (prompt, adapter, 60 - 17 * number)
        for number, adapter in enumerate((*adapters, None))
        for prompt in prompts
    ]
    with engine.counting() as counts:
        tokens = generate(engine, requests)
    assert len({*map(tuple, tokens)}) == len(requests)
    counts.assert_speculated()
    # Near ties may fall differently in bfloat16.
    wanted = 0.95 if ON_GPU else 1.0
    assert counts.num_accepted_tokens >= wanted * counts.num_draft_tokens
