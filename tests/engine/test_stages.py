# SPDX-License-Identifier: Apache-2.0
"""Early stage, late stage and what they leave behind, against a torch reference.

The reference is transformers' Llama, which shares no code with vLLM. Catches a stage cut
at the wrong layer and K/V that a draft or a verify step left wrong (pitfalls T7).
"""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_reference
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from vllm_layerskip.training.exits import record_exit_states

TOLERANCE = {"rtol": 1e-3, "atol": 2e-4}  # float32, other kernels, 12 layers


@pytest.mark.parametrize("exit_layer", [1, 3, 11])
def test_exit_states_of_drafts_equal_the_reference(pool, checkpoint, prompts, exit_layer):
    num_speculative_tokens = 4
    engine = pool.layerskip(checkpoint, exit_layer, num_speculative_tokens)
    engine.reset_prefix_cache()
    prompt = prompts[0]
    engine.start("request", prompt, max_tokens=40)
    tokens = engine.step()["request"]  # Prefill: one sampled token, then K drafts behind it.
    slot = next(iter(engine.runner.req_states.req_id_to_index.values()))
    drafts = engine.runner.req_states.draft_tokens[slot].tolist()
    hidden_states, residual = engine.runner.model_state.exit_states.states[:, slot]
    with record_exit_states(model := load_reference(checkpoint)) as states, torch.inference_mode():
        model(torch.tensor([prompt + tokens + drafts[:-1]]))
    expected = states[exit_layer - 1][0, -num_speculative_tokens:]
    torch.testing.assert_close(hidden_states + residual, expected, **TOLERANCE)
    predicted = model.lm_head(model.model.norm(expected)).argmax(-1).tolist()
    assert drafts == predicted
    engine.run_to_end()


def test_logprobs_equal_the_reference(pool, checkpoint, prompts):
    """The late stage over reused exit states gives the whole model's distribution."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1)
    engine = pool.layerskip(checkpoint, 3, 5)
    with engine.counting() as counts:
        (output,) = engine.llm.generate(
            [TokensPrompt(prompt_token_ids=prompts[0])], params, use_tqdm=False
        )
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    tokens = list(output.outputs[0].token_ids)
    with torch.inference_mode():
        logits = load_reference(checkpoint)(torch.tensor([prompts[0] + tokens])).logits[0]
    logprobs = logits[len(prompts[0]) - 1 : -1].log_softmax(-1)
    expected = logprobs[torch.arange(len(tokens)), torch.tensor(tokens)]
    actual = torch.tensor(
        [
            step[token].logprob
            for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)
        ]
    )
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("model_name", "num_tokens", "async_scheduling"),
    # Random weights reject nearly every draft: some 200 steps, each of which wrote K/V in vain.
    [
        ("checkpoint", 100, False),
        ("random_checkpoint", 210, False),
        ("random_checkpoint", 210, True),
    ],
    ids=["checkpoint", "random", "random-async"],
)
def test_kv_cache_of_committed_tokens_equals_plain_decoding(
    pool, request, prompts, model_name, num_tokens, async_scheduling
):
    """All layers, all committed positions, after many accepted and rejected drafts."""
    model = request.getfixturevalue(model_name)
    prompt = prompts[0] if model_name == "checkpoint" else [0, *range(3, 40)]
    settings = {"block_size": 32}
    layerskip = pool.layerskip(model, 3, 4, async_scheduling=async_scheduling, **settings)
    caches, steps = [], []
    for engine in (pool.get(model, **settings), layerskip):
        engine.reset_prefix_cache()
        engine.start("request", prompt, max_tokens=num_tokens + 5)
        tokens: list[int] = []
        steps.append(0)
        while len(tokens) < num_tokens:
            tokens = engine.step().get("request", tokens)
            steps[-1] += 1
        (slot,) = engine.runner.req_states.req_id_to_index.values()
        num_blocks = (len(prompt) + num_tokens - 8) // 32  # Whole blocks of committed tokens.
        blocks = engine.runner.block_tables.block_tables[0].gpu[slot, :num_blocks].long()
        caches.append([layer_cache(cache, blocks) for cache in engine.runner.kv_caches])
        engine.run_to_end()
    assert steps[1] < steps[0], "nothing was accepted"
    if model_name == "random_checkpoint":
        assert steps[1] > 150, "nearly nothing was rejected"
    plain, layerskip = caches
    assert len(plain) == len(layerskip) == (12 if model_name == "checkpoint" else 4)
    for expected, actual in zip(plain, layerskip, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(actual, expected, **TOLERANCE)


def layer_cache(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return cache[blocks].clone()
