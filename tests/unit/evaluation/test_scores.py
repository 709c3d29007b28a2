# SPDX-License-Identifier: Apache-2.0
"""Catch scores that are not what an engine would measure: the teacher-forced shortcut is
compared with a plain draft-and-verify loop that shares no code with it."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_layerskip.evaluation.scores import (
    acceptance_length,
    accepted_runs,
    greedy_draft_matches,
    score_exits,
)

NUM_LAYERS, VOCAB_SIZE, NUM_NEW_TOKENS = 4, 24, 26

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    """Random, in float64 (no near ties); late layers say less, so that exits are often right."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.4
            layer.mlp.down_proj.weight *= 0.4
    return model


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(0, VOCAB_SIZE, (4, 6), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def matches(model, prompts):
    return greedy_draft_matches(model, prompts, NUM_NEW_TOKENS)


@pytest.fixture(scope="module")
def targets(model, prompts):
    """The greedy continuations, one token at a time."""
    continuations = []
    for prompt in prompts.tolist():
        ids = list(prompt)
        for _ in range(NUM_NEW_TOKENS):
            ids.append(_next_tokens(model, ids)[-1])
        continuations.append(ids[len(prompt) :])
    return continuations


def _cut(model, num_layers):
    """A model of the first layers, with the same norm and head."""
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:num_layers]
    return cut


@torch.no_grad()
def _next_tokens(model, ids):
    """The model's greedy choice behind every prefix of ``ids``."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()


def _draft_and_verify(model, draft, prompt, num_drafts):
    """Self-speculation as an engine does it: ``(accepted per step, continuation)``."""
    ids = [*prompt, _next_tokens(model, prompt)[-1]]
    accepted = []
    while len(ids) - len(prompt) + num_drafts + 1 <= NUM_NEW_TOKENS:
        drafts = []
        for _ in range(num_drafts):
            drafts.append(_next_tokens(draft, ids + drafts)[-1])
        verified = _next_tokens(model, ids + drafts)[len(ids) - 1 :]
        num_accepted = 0
        while num_accepted < num_drafts and drafts[num_accepted] == verified[num_accepted]:
            num_accepted += 1
        ids += verified[: num_accepted + 1]
        accepted.append(num_accepted)
    return accepted, ids[len(prompt) :]


@pytest.mark.parametrize("num_drafts", [1, 3, 5])
@pytest.mark.parametrize("exit_layer", range(1, NUM_LAYERS))
def test_the_shortcut_counts_what_drafting_and_verifying_would_accept(
    model, prompts, targets, matches, exit_layer, num_drafts
):
    draft = _cut(model, exit_layer)
    steps = []
    rows = zip(matches[exit_layer - 1].tolist(), prompts.tolist(), targets, strict=True)
    for row, prompt, target in rows:
        accepted, continuation = _draft_and_verify(model, draft, prompt, num_drafts)
        assert continuation == target[: len(continuation)]
        assert accepted_runs(row[1:], num_drafts) == accepted
        steps += accepted
    expected = 1 + sum(steps) / len(steps)
    assert acceptance_length(matches[exit_layer - 1], num_drafts) == pytest.approx(expected)


def test_the_model_above_accepts_and_rejects(matches):
    """Otherwise the comparison would hold for any shortcut."""
    for exit_layer in range(1, NUM_LAYERS):
        runs = [n for row in matches[exit_layer - 1].tolist() for n in accepted_runs(row[1:], 3)]
        assert {0, 3} < set(runs)


def test_a_match_is_the_exits_greedy_choice_against_the_targets(model, prompts, targets, matches):
    assert matches.shape == (NUM_LAYERS - 1, len(prompts), NUM_NEW_TOKENS)
    for exit_layer in range(1, NUM_LAYERS):
        draft = _cut(model, exit_layer)
        rows = zip(matches[exit_layer - 1].tolist(), prompts.tolist(), targets, strict=True)
        for row, prompt, target in rows:
            choices = _next_tokens(draft, prompt + target[:-1])[len(prompt) - 1 :]
            assert row == [a == b for a, b in zip(choices, target, strict=True)]


Y, N = True, False


@pytest.mark.parametrize(
    ("row", "num_speculative_tokens", "expected"),
    [
        ([Y, Y, Y, Y], 1, [1, 1]),
        ([N, N, N, N], 1, [0, 0, 0]),
        ([Y, N, Y, Y, N, Y], 2, [1, 2]),
        ([Y, Y, N, N, Y, Y, Y], 2, [2, 0, 2]),
        ([N, Y, Y, Y, Y], 3, [0, 3]),
        # Too short for one step's drafts and the token behind them.
        ([Y, Y, Y], 3, []),
        ([], 1, []),
    ],
)
def test_a_step_ends_at_the_first_mismatch_and_takes_one_token_more(
    row, num_speculative_tokens, expected
):
    assert accepted_runs(row, num_speculative_tokens) == expected


def test_acceptance_length_is_the_mean_over_the_steps_of_all_rows():
    # The first token of a row is the prefill's. Steps: 2, 2 and 0, 0, 0, 0.
    matches = torch.tensor([[N, Y, Y, N, Y, Y, Y], [Y, N, N, N, N, Y, Y]])
    assert acceptance_length(matches, 2) == pytest.approx((3 + 3 + 1 + 1 + 1 + 1) / 6)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_every_exits_score_is_that_of_the_model_cut_behind_it(model, batch_size):
    windows = torch.randint(0, VOCAB_SIZE, (5, 12), generator=torch.Generator().manual_seed(7))
    scores = score_exits(model, windows, batch_size)
    assert [score.exit_layer for score in scores] == list(range(1, NUM_LAYERS + 1))
    for score in scores:
        cut = _cut(model, score.exit_layer)
        with torch.no_grad():
            loss = cut(windows, labels=windows, use_cache=False).loss.item()
        choices = [_next_tokens(cut, window)[:-1] for window in windows.tolist()]
        correct = [
            choice == token
            for row, window in zip(choices, windows.tolist(), strict=True)
            for choice, token in zip(row, window[1:], strict=True)
        ]
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert score.accuracy == pytest.approx(sum(correct) / len(correct))
