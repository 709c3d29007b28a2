# SPDX-License-Identifier: Apache-2.0
"""Catch an early-exit loss whose value or gradient is not the weighted sum over the exits, that
skips part of a model's head, or whose memory grows with the number of exits."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from vllm_layerskip.evaluation.exits import check_decoder, exit_logits, record_exit_states
from vllm_layerskip.training.loss import ExitLoss, ExitMeter, exit_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS, VOCAB_SIZE, B, T = 4, 48, 3, 11
WEIGHTS = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    # Heads that do more than a product: scale, and soft cap.
    "granite": (GraniteConfig, {"logits_scaling": 8.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.0625}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 2.0}),
}


def make_model(name, **settings):
    torch.manual_seed(0)
    config_class, own = CONFIGS[name]
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    return AutoModelForCausalLM.from_config(config_class(**shape | own | settings))


@pytest.fixture(params=CONFIGS)
def model(request):
    return make_model(request.param)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB_SIZE, (B, T), generator=generator)
    labels = ids.clone()
    labels[0, :5] = labels[2, 3:] = -100
    return {"input_ids": ids, "labels": labels}


def run(model, batch, weights, meter=None, **kwargs):
    meter = meter or ExitMeter(len(model.model.layers), torch.device("cpu"))
    with ExitLoss(model, weights, meter).applied():
        return model(**batch, use_cache=False, **kwargs).loss


def naive(model, batch, weights, num_items=None):
    """The sum spelled out: every exit by a model that ends there."""
    total = torch.zeros(())
    for layer, weight in weights.items():
        exits_early = copy.copy(model)
        exits_early._modules = dict(model._modules)
        decoder = copy.copy(model.model)
        decoder._modules = dict(model.model._modules)
        decoder._modules["layers"] = torch.nn.ModuleList(model.model.layers[: layer + 1])
        decoder.config = copy.deepcopy(model.config)
        decoder.config.num_hidden_layers = layer + 1
        exits_early._modules["model"] = decoder
        logits = exits_early(batch["input_ids"], use_cache=False).logits
        log_p = logits.float().log_softmax(-1)
        labels = batch["labels"]
        terms = [
            -log_p[b, t, labels[b, t + 1]]
            for b in range(B)
            for t in range(T - 1)
            if labels[b, t + 1] != -100
        ]
        total = total + weight * sum(terms) / (num_items or len(terms))
    return total


@pytest.mark.parametrize("num_items", [None, 100])
def test_loss_and_every_gradient_are_those_of_the_sum_spelled_out(model, batch, num_items):
    kwargs = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    reference = copy.deepcopy(model)
    loss = run(model, batch, WEIGHTS, **kwargs)
    expected = naive(reference, batch, WEIGHTS, num_items)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_exits_logits_are_scaled_and_capped_as_the_models(model, batch):
    with torch.no_grad(), record_exit_states(model) as states:
        expected = model(batch["input_ids"], use_cache=False).logits
    assert len(states) == NUM_LAYERS
    with torch.no_grad():
        torch.testing.assert_close(exit_logits(model, states[-1]), expected)
        single = exit_logits(model, states[-1][0, 2])
    torch.testing.assert_close(single, expected[0, 2])
    # The decoder's own forward is back.
    torch.testing.assert_close(model(batch["input_ids"], use_cache=False).logits, expected)


def test_with_the_last_exit_alone_the_loss_is_the_models_own(model, batch):
    expected = model(**batch, use_cache=False).loss
    assert torch.equal(run(model, batch, {NUM_LAYERS - 1: 1.0}), expected)


@pytest.fixture
def llama():
    return make_model("llama")


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_the_chunks_size_changes_nothing(llama, batch, chunk_tokens):
    state = torch.randn(B, T, 32, requires_grad=True)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    positions = (targets != -100).nonzero().squeeze(1)
    total = exit_cross_entropy(llama, state, targets, positions, chunk_tokens)
    (gradient,) = torch.autograd.grad(total, state)
    expected = F.cross_entropy(
        llama.lm_head(llama.model.norm(state)).flatten(0, 1), targets, reduction="sum"
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, state)[0])


def test_a_batch_without_targets_at_an_exit_gives_no_nan(llama, batch):
    batch["labels"][:] = -100
    loss = run(llama, batch, WEIGHTS, num_items_in_batch=torch.tensor(10))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in llama.parameters() if p.grad is not None)


def test_the_meter_gives_means_over_tokens_and_forgets(llama, batch):
    meter = ExitMeter(NUM_LAYERS, torch.device("cpu"))
    run(llama, batch, {1: 0.5, 3: 0.5}, meter)
    first = {k: v[:1] for k, v in batch.items()}
    run(llama, first, {1: 0.5, 3: 0.5}, meter)
    values = meter.read(lambda totals: totals)
    assert values.keys() == {"exit_2_loss", "exit_4_loss"}
    counts = [(part["labels"][:, 1:] != -100).sum() for part in (batch, first)]
    each = [llama(**part, use_cache=False).loss for part in (batch, first)]
    expected = sum(c * v for c, v in zip(counts, each, strict=True)) / sum(counts)
    assert values["exit_4_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert meter.read(lambda totals: totals) == {}


def test_a_model_that_computes_no_loss_is_noticed(llama, batch):
    del batch["labels"]
    with pytest.raises(RuntimeError, match="no labels"):
        run(llama, batch, WEIGHTS)
    assert "_loss_function" not in vars(llama)


def test_models_without_exits_are_refused():
    shape = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 16}
    with torch.device("meta"):
        others = [
            AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_head=2, n_layer=2)),
            AutoModelForCausalLM.from_config(
                BertConfig(**shape, num_hidden_layers=1, intermediate_size=16, is_decoder=True)
            ),
            LlamaForSequenceClassification(
                LlamaConfig(**shape, num_hidden_layers=1, intermediate_size=16)
            ),
        ]
    for other in others:
        with pytest.raises(ValueError, match="Use a dense decoder-only model") as error:
            check_decoder(other)
        assert type(other).__name__ in str(error.value)


# --- Memory


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still referenced."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage):
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key, num_bytes):
        self.seen.discard(key)
        self.live -= num_bytes


def peak_bytes(num_exits, loss_of=run, vocab_size=4096, num_tokens=1024, num_layers=8):
    """Peak memory of a forward and backward pass over 2 * num_tokens tokens; logits dominate it."""
    shape = {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "hidden_size": 16}
    model = make_model("llama", attn_implementation="sdpa", **shape)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab_size, (2, num_tokens), generator=generator)
    weights = {num_layers - 1 - i: 1 / num_exits for i in range(num_exits)}
    with LiveBytes() as live:
        loss_of(model, {"input_ids": ids, "labels": ids}, weights).backward()
    return live.peak


def without_chunks(model, batch, weights):
    """What a plain implementation does: all exits' logits wait for the backward pass."""
    with record_exit_states(model) as states:
        model.model(batch["input_ids"], use_cache=False)
    targets = batch["labels"][:, 1:].flatten()
    return sum(
        weight
        * F.cross_entropy(
            model.lm_head(model.model.norm(states[layer][:, :-1])).flatten(0, 1), targets
        )
        for layer, weight in weights.items()
    )


def test_memory_does_not_grow_with_the_number_of_exits():
    """One exit is the model itself; further ones need a chunk of logits, whatever their number."""
    logits = 2 * 1024 * 4096 * 4
    naive = {n: peak_bytes(n, without_chunks) for n in (1, 8)}
    assert naive[8] - naive[1] > 6 * logits
    peaks = {n: peak_bytes(n) for n in (1, 2, 8)}
    assert peaks[8] - peaks[2] < 0.1 * logits, peaks
    # A chunk is half of this batch; its logits, their float copy and gradient at a time.
    assert peaks[8] - peaks[1] < 2 * logits, peaks
