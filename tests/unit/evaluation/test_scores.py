# SPDX-License-Identifier: Apache-2.0
"""Catch scores that are not what their definition says."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from unit.evaluation.reference import cut, next_tokens
from unit.evaluation.tiny_models import FAMILIES, SHAPE, scores_by_definition
from vllm_layerskip.evaluation.scores import score_exits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("logits_at_once", [1 << 25, 40 * 7])
def test_every_exit_is_scored_as_a_model_of_its_own(family, logits_at_once, monkeypatch):
    monkeypatch.setattr("vllm_layerskip.evaluation.exits.LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).double().eval()
    windows = torch.randint(0, SHAPE["vocab_size"], (5, 20))
    scored = torch.rand(5, 20) < 0.6
    scores = score_exits(model, windows, 2, scored=scored)
    expected = scores_by_definition(model, windows, scored)
    for score, (perplexity, accuracy, agreement) in zip(scores, expected, strict=True):
        assert score.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert score.accuracy == pytest.approx(accuracy)
        assert score.agreement == pytest.approx(agreement)
    assert [score.exit_layer for score in scores] == [1, 2, 3]
    assert scores[-1].agreement == 1
    assert 0 < scores[0].agreement < 1


def test_one_pass_gives_all_exits():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    score_exits(model, torch.randint(0, 40, (6, 10)), batch_size=2)
    assert len(calls) == 3 * SHAPE["num_hidden_layers"]


def test_a_window_without_a_token_to_score_is_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
    with pytest.raises(ValueError, match="No token to score"):
        score_exits(model, torch.zeros(2, 5, dtype=torch.long), scored=torch.zeros(2, 5).bool())


@pytest.mark.parametrize("batch_size", [2, 16])
def test_every_exits_score_is_that_of_the_model_cut_after_it(batch_size):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).double().eval()
    windows = torch.randint(0, SHAPE["vocab_size"], (5, 12))
    scores = score_exits(model, windows, batch_size)
    assert [score.exit_layer for score in scores] == list(range(1, 4))
    for score in scores:
        first = cut(model, score.exit_layer)
        with torch.no_grad():
            loss = first(windows, labels=windows, use_cache=False).loss.item()
        choices = [next_tokens(first, window)[:-1] for window in windows.tolist()]
        correct = [
            choice == token
            for row, window in zip(choices, windows.tolist(), strict=True)
            for choice, token in zip(row, window[1:], strict=True)
        ]
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert score.accuracy == pytest.approx(sum(correct) / len(correct))
