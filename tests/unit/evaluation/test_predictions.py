# SPDX-License-Identifier: Apache-2.0
"""Catch predictions of the wrong exit or token, and acceptance that is not what an engine would
measure: the one pass is compared with a plain draft-and-verify loop that shares no code with it."""

import numpy as np
import pytest
import torch

from unit.evaluation import reference
from unit.evaluation.tiny_models import random_llama
from vllm_layerskip.evaluation.predictions import generate_greedily, measure_agreement

NUM_LAYERS, VOCAB_SIZE, NUM_NEW_TOKENS = 4, 24, 26
EXITS = range(1, NUM_LAYERS)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    """Random, in float64 (no near ties); late layers say less, so that exits are often right."""
    no_ends = {"bos_token_id": None, "eos_token_id": None}
    model = random_llama(vocab_size=VOCAB_SIZE, initializer_range=0.3, **no_ends).double()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.4
            layer.mlp.down_proj.weight *= 0.4
    return model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = (6, 6, 11, 3, 6)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def answers(model, prompts):
    return generate_greedily(model, prompts, NUM_NEW_TOKENS, (), batch_size=3)


@pytest.fixture(scope="module")
def agreement(model, prompts, answers):
    return measure_agreement(model, prompts, answers, EXITS, max_batch_tokens=80)


def test_continuations_are_greedy_whatever_else_is_in_the_batch(model, prompts, answers):
    expected = [reference.continuation(model, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    assert answers == expected


def test_a_match_is_the_exits_greedy_choice_against_the_targets(model, prompts, answers, agreement):
    for prompt, answer, rows in zip(prompts, answers, agreement.matches, strict=True):
        for exit_layer, row in zip(EXITS, rows.tolist(), strict=True):
            assert row == reference.matches(model, exit_layer, prompt, answer)
    assert agreement.target_agreement == 1.0
    assert agreement.num_tokens == len(prompts) * (NUM_NEW_TOKENS - 1)
    assert 0 < agreement.rate(1) < agreement.rate(3) < 1


@pytest.mark.parametrize("num_drafts", [1, 3, 5])
@pytest.mark.parametrize("exit_layer", EXITS)
def test_one_pass_counts_what_drafting_and_verifying_would_accept(
    model, prompts, answers, agreement, exit_layer, num_drafts
):
    draft = reference.cut(model, exit_layer)
    steps = []
    for prompt, answer, rows in zip(prompts, answers, agreement.matches, strict=True):
        accepted, continuation = reference.draft_and_verify(
            model, draft, prompt, num_drafts, NUM_NEW_TOKENS
        )
        assert continuation == answer[: len(continuation)]
        row = rows[exit_layer - 1].tolist()
        assert reference.accepted_runs(row, num_drafts) == accepted
        steps += accepted
    lengths = agreement.acceptance_lengths(num_drafts)
    assert lengths[exit_layer - 1, num_drafts - 1] == pytest.approx(1 + sum(steps) / len(steps))


def test_the_model_above_accepts_and_rejects(agreement):
    """Otherwise the comparison would hold for any shortcut."""
    for exit_layer in EXITS:
        rows = (rows[exit_layer - 1].tolist() for rows in agreement.matches)
        runs = [run for row in rows for run in reference.accepted_runs(row, 3)]
        assert {0, 3} < set(runs)


def test_an_answer_ends_with_its_stop_token(model, prompts, answers):
    stop = answers[0][6]
    stopped = generate_greedily(model, prompts, NUM_NEW_TOKENS, (stop,))
    model.generation_config.eos_token_id = stop  # Only what is asked for ends an answer.
    try:
        assert generate_greedily(model, prompts, NUM_NEW_TOKENS, ()) == answers
    finally:
        model.generation_config.eos_token_id = None
    for answer, whole in zip(stopped, answers, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert answer == whole[:end]
    agreement = measure_agreement(model, prompts, stopped, EXITS)
    compared = [len(answer) - 1 for answer in stopped if len(answer) > 1]
    assert [rows.shape[1] for rows in agreement.matches] == compared
    assert agreement.target_agreement == 1.0


def test_a_draft_vocabulary_binds_exits_and_not_the_target(model, prompts, answers):
    every = measure_agreement(model, prompts, answers, (3,), range(VOCAB_SIZE))
    none = measure_agreement(model, prompts, answers, (3,))
    np.testing.assert_array_equal(every.matches[0], none.matches[0])
    # Only a token that is in it can match; and it matches at least where it did without.
    vocab = sorted(set(answers[0]))[::2]
    some = measure_agreement(model, prompts, answers, (3,), vocab)
    assert some.target_agreement == 1.0
    for answer, bound, free in zip(answers, some.matches, none.matches, strict=True):
        listed = np.isin(answer[1:], vocab)
        assert not bound[0][~listed].any()
        assert bound[0][listed & free[0]].all()


def test_a_small_head_chunk_changes_nothing(model, prompts, answers, agreement, monkeypatch):
    monkeypatch.setattr("vllm_layerskip.evaluation.exits.LOGITS_AT_ONCE", 5 * VOCAB_SIZE)
    again = measure_agreement(model, prompts, answers, EXITS)
    for ours, theirs in zip(again.matches, agreement.matches, strict=True):
        np.testing.assert_array_equal(ours, theirs)
