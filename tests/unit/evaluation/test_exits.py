# SPDX-License-Identifier: Apache-2.0
"""Catch exit states of the wrong layer, and a model that stays changed after they were read."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from unit.evaluation.tiny_models import random_llama
from vllm_layerskip.evaluation.exits import exit_logits, record_exit_states

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS, VOCAB_SIZE = 4, 48


@pytest.fixture
def model():
    return random_llama()


@pytest.fixture
def input_ids():
    return torch.randint(0, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))


def _run(model, input_ids):
    with torch.no_grad(), record_exit_states(model) as states:
        logits = model(input_ids, use_cache=False).logits
    return states, logits


def test_every_layer_leaves_one_exit_state_and_the_last_one_is_the_model(model, input_ids):
    states, logits = _run(model, input_ids)
    assert len(states) == NUM_LAYERS
    with torch.no_grad():
        hidden_states = model.model(input_ids, output_hidden_states=True).hidden_states
        last = exit_logits(model, states[-1])
    for layer in range(NUM_LAYERS - 1):  # The last of transformers' own is normed already.
        torch.testing.assert_close(states[layer], hidden_states[layer + 1])
    torch.testing.assert_close(last, logits)


def test_an_exit_is_the_model_without_the_layers_after_it(model, input_ids):
    states, _ = _run(model, input_ids)
    for exit_layer in range(1, NUM_LAYERS):
        draft = copy.deepcopy(model)
        draft.model.layers = draft.model.layers[:exit_layer]
        with torch.no_grad():
            torch.testing.assert_close(
                exit_logits(model, states[exit_layer - 1]), draft(input_ids, use_cache=False).logits
            )


def test_recording_ends_with_its_block_even_after_an_error(model, input_ids):
    states, _ = _run(model, input_ids)
    with pytest.raises(IndexError), record_exit_states(model):
        model(input_ids + VOCAB_SIZE)
    assert all(type(layer) is LlamaDecoderLayer for layer in model.model.layers)
    assert all(type(layer).__call__ is LlamaDecoderLayer.__call__ for layer in model.model.layers)
    model(input_ids)
    assert len(states) == NUM_LAYERS
