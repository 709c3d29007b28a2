# SPDX-License-Identifier: Apache-2.0
"""Early stage, late stage and what they leave behind, against a torch reference.

The reference is transformers' Llama, which shares no code with vLLM. Catches a stage cut
at the wrong layer and K/V that a draft or a verify step left wrong (docs/tests.md, T7).
"""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_reference
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from vllm_layerskip.evaluation.exits import record_exit_states

TOLERANCE = {"rtol": 1e-3, "atol": 2e-4}  # float32, other kernels, 12 layers


@pytest.mark.parametrize("exit_layer", [1, 3, 11])
def test_exit_states_of_drafts_equal_the_reference(pool, checkpoint, prompts, exit_layer):
    num_speculative_tokens = 4
    engine = pool.layerskip(checkpoint, exit_layer, num_speculative_tokens)
    engine.reset_prefix_cache()
    prompt = prompts[0]
    engine.start("request", prompt, max_tokens=40)
    tokens = engine.step()["request"]  # Prefill: one sampled token, then K drafts after it.
    slot = next(iter(engine.runner.req_states.req_id_to_index.values()))
    drafts = engine.runner.req_states.draft_tokens[slot].tolist()
    hidden_states, residual = engine.runner.model_state.draft_state.exit_states.states[:, slot]
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
    ("model_name", "scrambled", "async_scheduling"),
    [
        ("checkpoint", False, False),
        ("random_checkpoint", False, False),
        ("checkpoint", True, False),
        ("checkpoint", True, True),
    ],
    ids=["checkpoint", "random", "scrambled", "scrambled-async"],
)
def test_kv_cache_of_committed_tokens_equals_plain_decoding(
    pool, request, prompts, model_name, scrambled, async_scheduling
):
    """All layers, all committed positions, after many accepted and rejected drafts.

    With a scrambled exit head nearly every step writes K/V of four drafts that are rejected.
    """
    model = request.getfixturevalue(model_name)
    prompt = prompts[0] if model_name == "checkpoint" else [0, *range(3, 40)]
    num_tokens = 210 if scrambled else 100
    settings = {"block_size": 32}
    layerskip = pool.layerskip(model, 3, 4, async_scheduling=async_scheduling, **settings)
    exit_norm = layerskip.runner.model.exit_norm
    if scrambled:
        layerskip.runner.model.exit_norm = lambda *state: exit_norm(*state).flip(-1)
    try:
        with layerskip.counting() as counts:
            actual = committed_kv(layerskip, prompt, num_tokens)
    finally:
        layerskip.runner.model.__dict__.pop("exit_norm", None)
    if scrambled:
        assert counts.num_drafts > 180
        assert counts.num_accepted_tokens < 0.05 * counts.num_draft_tokens
    else:
        counts.assert_speculated()
    expected = committed_kv(pool.get(model, **settings), prompt, num_tokens)
    assert len(expected) == len(actual) == (12 if model_name == "checkpoint" else 4)
    for expected_layer, layer in zip(expected, actual, strict=True):
        assert expected_layer.abs().sum() > 0
        torch.testing.assert_close(layer, expected_layer, **TOLERANCE)


def committed_kv(engine, prompt, num_tokens):
    """K/V of every layer in the whole blocks that a request fills with its first tokens."""
    engine.reset_prefix_cache()
    engine.start("request", prompt, max_tokens=num_tokens + 5)
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens = engine.step().get("request", tokens)
    (slot,) = engine.runner.req_states.req_id_to_index.values()
    num_blocks = (len(prompt) + num_tokens - 8) // 32
    blocks = engine.runner.block_tables.block_tables[0].gpu[slot, :num_blocks].long()
    layers = [cache[blocks].clone() for cache in engine.runner.kv_caches]
    engine.run_to_end()
    return layers
