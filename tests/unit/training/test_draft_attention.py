# SPDX-License-Identifier: Apache-2.0
"""Catch drafts that are trained to attend to other K/V than they see in the engine, where all
positions before a draft step hold the target's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from vllm_layerskip.training.drafts.attention import TargetKV
from vllm_layerskip.training.drafts.lora import add_draft_lora
from vllm_layerskip.training.drafts.loss import DraftLoss, TargetPass
from vllm_layerskip.training.drafts.recipe import DraftRecipe

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS, EXIT_LAYER, VOCAB_SIZE, NUM_TOKENS = 4, 2, 48, 13
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama-eager": (LlamaConfig, {"attn_implementation": "eager"}),
    "qwen3": (Qwen3Config, {}),
    "mistral-window": (MistralConfig, {"sliding_window": 5}),
    # Every second layer has a window, and attention is capped.
    "gemma2": (Gemma2Config, {"sliding_window": 5, "attn_implementation": "eager"}),
}


def make_adapted(name, final_norm=False):
    """A model whose adapters do something."""
    torch.manual_seed(0)
    config_class, own = FAMILIES[name]
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(config_class(**shape | own)).eval()
    recipe = DraftRecipe(EXIT_LAYER, final_norm=final_norm)
    adapted = add_draft_lora(model, recipe, {"r": 4}).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted.double()


def token_ids():
    return torch.randint(1, VOCAB_SIZE, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


def drafts_pass(adapted, ids, num_drafts, offset):
    """States of layer E-1 as in training, ``[B, T, H]``."""
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    target = TargetPass(adapted, EXIT_LAYER)
    target.run(adapted, inputs)
    states = []
    hook = target.causal_lm.model.layers[EXIT_LAYER - 1].register_forward_hook(
        lambda _module, _args, output: states.append(output.detach())
    )
    with DraftLoss(target, EXIT_LAYER, "both").applied(num_drafts, offset):
        adapted(**inputs)
    hook.remove()
    target.kv.forget()
    return states[0]


def engine_step(adapted, ids, start, num_drafts):
    """States of one draft step that begins at ``start``, token by token ``[B, K, H]``.

    The target has written the K/V before it.
    """
    adapted = copy.deepcopy(adapted)
    cache = DynamicCache(config=adapted.get_base_model().config)
    with torch.no_grad(), adapted.disable_adapter():
        if start:
            adapted(input_ids=ids[:, :start], past_key_values=cache, use_cache=True)
    states = []
    adapted.get_base_model().model.layers[EXIT_LAYER - 1].register_forward_hook(
        lambda _module, _args, output: states.append(output)
    )
    with torch.no_grad():
        for position in range(start, start + num_drafts):
            token = ids[:, position : position + 1]
            adapted(input_ids=token, past_key_values=cache, use_cache=True)
    return torch.cat(states, 1)


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_sees_in_training_what_it_sees_in_the_engine(name, num_drafts):
    adapted, ids = make_adapted(name), token_ids()
    for offset in range(num_drafts):
        states = drafts_pass(adapted, ids, num_drafts, offset)
        for start in range(offset, NUM_TOKENS - num_drafts + 1, num_drafts):
            expected = engine_step(adapted, ids, start, num_drafts)
            # Softmax is in float32 in eager attention.
            torch.testing.assert_close(
                states[:, start : start + num_drafts], expected, rtol=1e-4, atol=1e-5
            )


def test_with_its_own_kv_everywhere_it_would_see_something_else():
    """The negative control: one step as long as the text is ordinary training."""
    adapted, ids = make_adapted("llama"), token_ids()
    states = drafts_pass(adapted, ids, NUM_TOKENS, 0)
    expected = engine_step(adapted, ids, 9, 3)
    assert (states[:, 9:12] - expected).abs().max() > 1e-2


def test_padding_is_not_attended_to():
    adapted, ids = make_adapted("llama"), token_ids()
    short = ids[:1, :8]
    target = TargetPass(adapted, EXIT_LAYER)
    matches = {}
    for length in (8, NUM_TOKENS):
        padded = torch.nn.functional.pad(short, (0, length - 8))
        inputs = {
            "input_ids": padded,
            "labels": padded.masked_fill(torch.arange(length) >= 8, -100),
            "attention_mask": (torch.arange(length) < 8).long()[None],
            "use_cache": False,
        }
        target.run(adapted, inputs)
        loss = DraftLoss(target, EXIT_LAYER, "kl")
        with loss.applied(3, 1):
            matches[length] = adapted(**inputs).loss
    torch.testing.assert_close(matches[8], matches[NUM_TOKENS])


def test_gradient_checkpointing_gives_the_same_gradients():
    """It runs layers again in the backward pass, when the forward's block is over."""
    gradients = []
    for checkpointing in (False, True):
        adapted = make_adapted("llama", final_norm=True).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        drafts_pass_and_backward(adapted)
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def drafts_pass_and_backward(adapted):
    ids = token_ids()
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    target = TargetPass(adapted, EXIT_LAYER)
    target.run(adapted, inputs)
    with DraftLoss(target, EXIT_LAYER, "both").applied(3, 1):
        loss = adapted(**inputs).loss
    loss.backward()


def test_an_attention_without_a_cache_is_told():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = torch.nn.Linear(2, 2)

    layer = Layer()
    kv = TargetKV([layer])
    with pytest.raises(TypeError, match="Linear keeps no K/V in past_key_values"), kv.recorded():
        pass
