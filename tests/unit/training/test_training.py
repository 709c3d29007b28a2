# SPDX-License-Identifier: Apache-2.0
"""Catch a training run that trains something other than the recipe, sees what it must not see,
or saves a checkpoint that serving cannot use."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    set_seed,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vllm_layerskip.config.options import CONFIG_BLOCK, resolve_options
from vllm_layerskip.evaluation.exits import exit_logits, record_exit_states
from vllm_layerskip.files.corpus import HELD_OUT_MODULES, Corpus, held_out_prompts, load_stdlib
from vllm_layerskip.training.embedded_checkpoint import (
    TrainingPlan,
    load_checkpoint,
    save_checkpoint,
    score_model,
    train_model,
)
from vllm_layerskip.training.recipe import Recipe
from vllm_layerskip.training.tokenizer import train_tokenizer
from vllm_layerskip.training.trainer import LayerSkipTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS, VOCAB_SIZE = 4, 48


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


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


def test_an_exit_is_the_model_without_the_layers_behind_it(model, input_ids):
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
    states, _ = _run(model, input_ids)
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


# --- Corpus and tokenizer


@pytest.fixture
def library(tmp_path):
    """A small standard library: two held-out modules, two others, and what is skipped."""
    lines = {
        "bisect.py": [f"bisect_{i} = {i}\n" for i in range(200)],
        "json/encoder.py": [f"encoder_{i} = {i}\n" for i in range(120)],
        "json/decoder.py": [f"decoder_{i} = {i}\n" for i in range(400)],
        "abc.py": [f"abc_{i} = {i}\n" for i in range(400)],
        "test/bisect.py": ["skipped = 1\n"],
        "site-packages/numpy/core.py": ["skipped = 1\n"],
        "idlelib/idle_test/mock.py": ["skipped = 1\n"],
    }
    for name, content in lines.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(content))
    (tmp_path / "lib" / "latin.py").write_bytes(b"name = '\xe9'\n")
    return tmp_path / "lib"


def test_held_out_modules_are_not_trained_on_and_skipped_folders_not_read(library):
    corpus = load_stdlib(library)
    assert set(corpus.train) == {"abc.py", "json/decoder.py"}
    assert set(corpus.held_out) == {"bisect.py", "json/encoder.py"}
    assert corpus.train["abc.py"] == (library / "abc.py").read_text()


def test_prompts_are_cut_from_held_out_modules_in_turn(library):
    corpus = load_stdlib(library)
    prompts = held_out_prompts(corpus, 4, num_lines=10, max_chars=100)
    assert [name for name, _ in prompts] == ["bisect.py", "json/encoder.py"] * 2
    assert len({text for _, text in prompts}) == 4
    for name, text in prompts:
        assert 0 < len(text) <= 100
        assert text in corpus.held_out[name]
        assert not corpus.held_out[name].startswith(text)


def test_no_prompt_occurs_anywhere_in_the_real_training_text():
    corpus = load_stdlib()
    assert not set(HELD_OUT_MODULES) & set(corpus.train)
    assert len(corpus.held_out) >= len(HELD_OUT_MODULES) - 1
    prompts = held_out_prompts(corpus, 48)
    assert len(prompts) == 48
    assert len({name for name, _ in prompts[:16]}) == 16
    training_text = "".join(corpus.train.values())
    assert [name for name, text in prompts if text in training_text] == []


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Install the full standard library") as error:
        load_stdlib(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_digest_tells_any_two_corporaapart():
    corpora = [
        Corpus({"a.py": "x"}, {"b.py": "y"}),
        Corpus({"a.py": "x"}, {"b.py": "z"}),
        Corpus({"a.py": "y"}, {"b.py": "x"}),
        Corpus({"b.py": "x"}, {"a.py": "y"}),
        Corpus({"a.py": "x", "b.py": "y"}, {"c.py": "z"}),
    ]
    assert len({corpus.digest for corpus in corpora}) == len(corpora)
    same = Corpus({"b.py": "y", "a.py": "x"}, {"c.py": "z"})
    assert same.digest == corpora[-1].digest


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["def add(left, right):\n    return left + right\n", "import os\nimport sys\n"] * 20
    return train_tokenizer(texts, vocab_size=300, model_max_length=64)


@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_encoding_adds_no_token_of_its_own(tokenizer):
    ids = tokenizer("import os\n")["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[:1]).startswith("i")


def test_a_chat_begins_with_one_bos_and_holds_the_messages(tokenizer):
    messages = [{"role": "user", "content": "import os"}, {"role": "user", "content": "import sys"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>import os\nimport sys\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


# --- A whole run, three steps long

PLAN = TrainingPlan(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    seq_len=32,
    batch_size=2,
    num_steps=3,
    warmup_steps=1,
    bf16=False,
    exit_layer=1,
    num_speculative_tokens=4,
)


@pytest.fixture(scope="module")
def small_corpus():
    text = "".join(f"def add_{i}(left, right):\n    return left + right + {i}\n" for i in range(60))
    return Corpus({"train.py": text}, {"bisect.py": text.replace("add", "subtract")})


@pytest.fixture(scope="module")
def trained(tokenizer, small_corpus, tmp_path_factory):
    return train_model(PLAN, tokenizer, small_corpus, tmp_path_factory.mktemp("run"))


def test_a_run_changes_every_weight(trained):
    model, seconds = trained
    assert seconds > 0
    set_seed(PLAN.seed)
    untrained = LlamaForCausalLM(model.config)
    for (name, weight), start in zip(model.named_parameters(), untrained.parameters(), strict=True):
        assert weight.dtype == torch.float32, name
        assert weight.isfinite().all(), name
        assert not torch.equal(weight, start), name


def test_a_run_can_be_repeated(trained, tokenizer, small_corpus, tmp_path):
    again, _ = train_model(PLAN, tokenizer, small_corpus, tmp_path)
    for first, second in zip(trained[0].parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_a_run_follows_its_plans_recipe(trained, tokenizer, small_corpus, tmp_path):
    twin, _ = train_model(PLAN.twin(), tokenizer, small_corpus, tmp_path)
    ours, theirs = (model.model.layers[0].mlp.up_proj.weight for model in (trained[0], twin))
    assert not torch.equal(ours, theirs)


def test_the_saved_checkpoint_holds_the_model_and_names_its_exit(trained, tokenizer, tmp_path):
    model, _ = trained
    save_checkpoint(PLAN, model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    options = resolve_options(
        {"model": "[self]"}, config["num_hidden_layers"], config[CONFIG_BLOCK]
    )
    assert (options.exit_layer, options.num_speculative_tokens) == (1, 4)

    stored = load_checkpoint(tmp_path)
    weights = model.state_dict()
    assert stored.state_dict().keys() == weights.keys()
    for name, weight in stored.state_dict().items():
        assert torch.equal(weight, weights[name].bfloat16().float()), name
    # Casting a whole model would round the rotary frequencies too, which are not stored.
    assert torch.equal(stored.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    text = "def add(left, right):\n"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (model.config.bos_token_id, 1)


def test_a_scored_model_has_every_exit_and_every_setting(trained, tokenizer, small_corpus):
    scores = score_model(
        PLAN, trained[0], tokenizer, small_corpus, num_prompts=2, prompt_len=12, num_new_tokens=12
    )
    assert [score["exit_layer"] for score in scores["exits"]] == [1, 2, 3]
    assert all(math.isfinite(score["perplexity"]) for score in scores["exits"])
    lengths = scores["acceptance_length"]
    assert set(lengths) == {"E=1", "E=2"}
    for by_k in lengths.values():
        for k in (1, 3, 5, 7):
            assert 1 <= by_k[f"K={k}"] <= k + 1


def test_the_twin_differs_from_the_plan_in_the_recipe_alone():
    twin = PLAN.twin()
    assert twin.recipe == Recipe.off() != PLAN.recipe
    assert {k: v for k, v in vars(twin).items() if k != "recipe"} == {
        k: v for k, v in vars(PLAN).items() if k != "recipe"
    }
