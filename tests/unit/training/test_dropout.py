# SPDX-License-Identifier: Apache-2.0
"""Catch layer dropout that drops other samples than drawn, or draws differently in another
process, after a resumption, or when a layer runs again for gradient checkpointing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM as Models
from transformers import (
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from vllm_layerskip.training.dropout import kept_samples, run_kept
from vllm_layerskip.training.loss import ExitLoss, ExitMeter

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS, VOCAB_SIZE, B, T = 4, 48, 4, 11
CONFIGS = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GraniteConfig]


def make_model(config_class, **settings):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return Models.from_config(config_class(**shape | settings))


@pytest.fixture
def model():
    return make_model(LlamaConfig)


@pytest.fixture
def batch():
    ids = torch.randint(0, VOCAB_SIZE, (B, T), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def run(model, batch, kept, weights=None, always_run=False):
    """Loss and logits of one forward in which ``kept [L, B]`` runs."""
    weights = weights or {NUM_LAYERS - 1: 1.0}
    meter = ExitMeter(NUM_LAYERS, torch.device("cpu"))
    with ExitLoss(model, weights, meter, kept, always_run).applied():
        output = model(**batch)
    return output.loss, output.logits


def everything(value=True):
    return np.full((NUM_LAYERS, B), value)


# --- Which samples


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(0, 64), st.integers(1, 9))
def test_the_numbers_follow_from_seed_step_and_micro_step_alone(seed, step, micro_step, samples):
    rates = [0.0, 0.3, 0.6, 0.9]
    kept = kept_samples(rates, samples, seed, step, micro_step)
    assert kept.shape == (4, samples)
    assert kept[0].all()
    assert (kept == kept_samples(rates, samples, seed, step, micro_step)).all()


def test_no_other_random_numbers_are_used_up():
    set_seed(5)
    expected = torch.rand(3), np.random.rand(3)
    set_seed(5)
    kept_samples([0.5] * 4, 8, seed=1, step=2)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


def test_seeds_steps_micro_steps_layers_and_samples_differ():
    rates = [0.5] * 16
    draws = [kept_samples(rates, 16, *key) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    for i, draw in enumerate(draws):
        assert all((draw != other).any() for other in draws[:i])
        assert len({tuple(row) for row in draw}) == 16
        assert len({tuple(column) for column in draw.T}) == 16


def test_each_layer_drops_its_share():
    rates = [0.0, 0.05, 0.2, 0.5]
    dropped = np.mean([~kept_samples(rates, 8, 0, step) for step in range(2000)], axis=(0, 2))
    assert dropped[0] == 0
    np.testing.assert_allclose(dropped, rates, atol=0.016)  # 4 standard deviations.


# --- What a dropped sample gets


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_layer_that_drops_everything_is_as_good_as_gone(config_class, batch):
    model = make_model(config_class)
    kept = everything()
    kept[1] = False
    loss, logits = run(model, batch, kept)
    shorter = copy.deepcopy(model)
    del shorter.model.layers[1]
    shorter.config.num_hidden_layers -= 1
    if getattr(shorter.config, "layer_types", None):
        del shorter.config.layer_types[1]
    expected = shorter(**batch)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=0)
    loss.backward()
    expected.loss.backward()
    assert all(p.grad is None for p in model.model.layers[1].parameters())
    for ours, theirs in ((0, 0), (2, 1), (3, 2)):
        pairs = zip(
            model.model.layers[ours].parameters(),
            shorter.model.layers[theirs].parameters(),
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config_class", CONFIGS)
def test_each_sample_gets_what_it_would_get_alone(config_class, padded, batch):
    """With and without a mask by sample, which must be cut to the kept samples as well."""
    model = make_model(config_class)
    kept = np.random.default_rng(3).random((NUM_LAYERS, B)) < 0.5
    if padded:
        batch["attention_mask"] = torch.ones(B, T, dtype=torch.long)
        batch["attention_mask"][1, -3:] = batch["attention_mask"][2, -5:] = 0
    _, logits = run(model, batch, kept)
    for sample in range(B):
        alone = {
            name: value[sample : sample + 1] if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        _, expected = run(model, alone, kept[:, sample : sample + 1])
        length = T if not padded else int(batch["attention_mask"][sample].sum())
        torch.testing.assert_close(
            logits[sample, :length], expected[0, :length], rtol=1e-4, atol=1e-5
        )


def test_a_sequence_as_long_as_the_batch_is_no_batch(model, batch):
    """T == B: what runs along tokens must not be mistaken for one row a sample."""
    kept = everything()
    kept[2] = [True, False, False, True]
    batch = {name: v[:, :B] if torch.is_tensor(v) else v for name, v in batch.items()}
    _, logits = run(model, batch, kept)
    for i in range(B):
        alone = {n: v[i : i + 1] if torch.is_tensor(v) else v for n, v in batch.items()}
        _, expected = run(model, alone, kept[:, i : i + 1])
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_dropped_samples_are_not_computed(model, batch):
    kept = everything()
    kept[1] = [True, False, False, True]
    kept[2] = False
    sizes = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape[0]))
    run(model, batch, kept)
    assert sizes == [4, 2, 4]


def test_gradients_are_those_of_masking_the_layers_output(model, batch):
    kept = np.random.default_rng(4).random((NUM_LAYERS, B)) < 0.6
    run(model, batch, kept)[0].backward()
    masked = copy.deepcopy(model)
    masked.zero_grad()
    for layer, keep in zip(masked.model.layers, torch.from_numpy(kept), strict=True):
        layer.register_forward_hook(
            lambda _m, args, output, keep=keep: torch.where(keep[:, None, None], output, args[0])
        )
    masked(**batch).loss.backward()
    for one, other in zip(model.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_drops_the_same_samples_again(model, batch, use_reentrant):
    kept = np.random.default_rng(5).random((NUM_LAYERS, B)) < 0.5
    kept[1] = [True, False, False, True]
    weights = {1: 0.25, 2: 0.25, 3: 0.5}
    run(model, batch, kept, weights)[0].backward()
    again = copy.deepcopy(model)
    again.zero_grad()
    again.train()
    again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    again.model.layers[1].mlp.register_forward_pre_hook(
        lambda _m, args: calls.append(args[0].shape)
    )
    loss, _ = run(again, batch, kept, weights)
    loss.backward()
    assert calls == [(2, T, 32)] * 2
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_with_several_ranks_every_parameter_gets_a_gradient(model, batch):
    kept = everything()
    kept[1] = False
    loss, logits = run(model, batch, kept, always_run=True)
    alone, expected = run(model, batch, kept)
    assert torch.equal(logits, expected)
    assert torch.equal(loss, alone)
    loss.backward()
    for parameter in model.model.layers[1].parameters():
        assert torch.count_nonzero(parameter.grad) == 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_an_infinite_output_of_a_dropped_layer_does_no_harm():
    hidden_states = torch.ones(2, 3, 4)
    output = run_kept(lambda x: x * torch.inf, hidden_states, {}, np.zeros(2, bool), True)
    assert torch.equal(output, hidden_states)


class _Opaque:
    """As flex attention's BlockMask: it cannot be cut along the batch."""


def test_what_cannot_be_cut_makes_the_layer_run_for_all(model):
    hidden_states = torch.randn(3, 2, 4)
    seen = []

    def layer(states, mask):
        seen.append((states.shape[0], type(mask)))
        return states + 1

    kept = np.array([True, False, True])
    output = run_kept(layer, hidden_states, {"mask": _Opaque()}, kept)
    assert seen == [(3, _Opaque)]
    assert torch.equal(output, hidden_states + torch.tensor([1.0, 0, 1])[:, None, None])
