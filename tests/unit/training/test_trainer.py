# SPDX-License-Identifier: Apache-2.0
"""Catch a trainer whose loss is not the recipe's."""

import pytest
import torch
from transformers import TrainingArguments

from unit.evaluation.tiny_models import random_llama
from vllm_layerskip.evaluation.exits import record_exit_states
from vllm_layerskip.training.recipe import Recipe
from vllm_layerskip.training.trainer import LayerSkipTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS, VOCAB_SIZE = 4, 48


@pytest.fixture
def model():
    return random_llama()


@pytest.fixture
def input_ids():
    return torch.randint(0, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def loss_of(model, input_ids, tmp_path):
    """``loss_of(recipe, step, training)``: compute_loss at that step of ten."""

    def loss_of(recipe, step, training=False):
        arguments = TrainingArguments(tmp_path, max_steps=10, use_cpu=True, report_to="none")
        trainer = LayerSkipTrainer(model=model, args=arguments, recipe=recipe)
        trainer.state.global_step, trainer.state.max_steps = step, 10
        model.train(training)
        return trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids})

    return loss_of


def _cross_entropy(logits, input_ids):
    """Mean of -log p(next token), spelled out."""
    log_p = logits.double().log_softmax(-1)
    num_samples, num_tokens = input_ids.shape
    terms = [
        -log_p[b, t, input_ids[b, t + 1]] for b in range(num_samples) for t in range(num_tokens - 1)
    ]
    return float(sum(terms)) / len(terms)


# e = 0.5 * (0, 1, 3) and 3 + 0.5 * (0 + 1 + 2); every second layer, moved on by one a step.
HAND_WEIGHTS = [
    (0, [0, 0, 1.5 / 6, 4.5 / 6]),
    (3, [0, 0.5 / 5, 0, 4.5 / 5]),
    (8, [0, 0, 1.5 / 6, 4.5 / 6]),
]


@pytest.mark.parametrize(("step", "weights"), HAND_WEIGHTS)
def test_the_loss_is_the_weighted_sum_over_the_exits_of_the_step(
    model, input_ids, loss_of, step, weights
):
    recipe = Recipe(max_layer_dropout=0.0, exit_loss_scale=0.5, rotation=2)
    with torch.no_grad(), record_exit_states(model) as states:
        model(input_ids, use_cache=False)
    with torch.no_grad():
        expected = sum(
            weight * _cross_entropy(model.lm_head(model.model.norm(state)), input_ids)
            for weight, state in zip(weights, states, strict=True)
        )
    assert loss_of(recipe, step, training=True).item() == pytest.approx(expected, rel=1e-5)
    # In evaluation it is the whole model's loss, whatever the step.
    assert loss_of(recipe, step).item() == pytest.approx(
        _cross_entropy(model(input_ids).logits, input_ids), rel=1e-5
    )


def test_the_twins_loss_is_the_language_models_own(model, input_ids, loss_of):
    expected = model(input_ids, labels=input_ids).loss.item()
    assert loss_of(Recipe.off(), 5, training=True).item() == pytest.approx(expected, rel=1e-5)


def test_layers_are_dropped_in_training_only_and_from_scratch_not_at_the_start(loss_of):
    recipe = Recipe(max_layer_dropout=0.99, exit_loss_scale=0.0, rotation=1)
    assert loss_of(recipe, 0, training=True).item() == loss_of(recipe, 0).item()
    last, scored = loss_of(recipe, 9, training=True).item(), loss_of(recipe, 9).item()
    assert last != pytest.approx(scored, rel=1e-4)
    assert scored == loss_of(recipe, 9).item()


def test_an_exits_loss_trains_the_layers_up_to_it(model, loss_of):
    recipe = Recipe(max_layer_dropout=0.0, exit_loss_scale=1.0, rotation=NUM_LAYERS)
    loss_of(recipe, 1, training=True).backward()
    assert all(layer.mlp.up_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    assert model.lm_head.weight.grad.abs().sum() > 0
