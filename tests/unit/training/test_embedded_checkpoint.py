# SPDX-License-Identifier: Apache-2.0
"""Catch a run that trains something other than its plan, or saves what serving cannot use."""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, set_seed

from unit.training.training_runs import small_tokenizer
from vllm_layerskip.config.options import CONFIG_BLOCK, resolve_options
from vllm_layerskip.files.corpus import Corpus
from vllm_layerskip.training import embedded_checkpoint
from vllm_layerskip.training.embedded_checkpoint import (
    TrainingPlan,
    load_checkpoint,
    save_checkpoint,
    score_model,
    train_model,
)
from vllm_layerskip.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

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
def tokenizer():
    return small_tokenizer()


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


def test_a_whole_run_leaves_a_checkpoint_its_scores_and_a_card(small_corpus, tmp_path, monkeypatch):
    score = functools.partial(score_model, num_prompts=2, prompt_len=12, num_new_tokens=12)
    monkeypatch.setattr(embedded_checkpoint, "score_model", score)
    monkeypatch.setattr(embedded_checkpoint, "load_stdlib", lambda: small_corpus)
    plan = replace(PLAN, num_speculative_tokens=3)
    embedded_checkpoint.run(plan, tmp_path, with_twin=True, keep_checkpoint=False)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["layerskip"].keys() == scores["twin"].keys() > {"seconds", "acceptance_length"}
    assert scores["layerskip"]["exits"] != scores["twin"]["exits"]
    assert "## Acceptance length" in (tmp_path / "README.md").read_text()
    weights = (tmp_path / "model.safetensors").read_bytes()

    embedded_checkpoint.run(plan, tmp_path, with_twin=False, keep_checkpoint=True)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "scores.json").read_text()) == scores


def test_the_twin_differs_from_the_plan_in_the_recipe_alone():
    twin = PLAN.twin()
    assert twin.recipe == Recipe.off() != PLAN.recipe
    assert {k: v for k, v in vars(twin).items() if k != "recipe"} == {
        k: v for k, v in vars(PLAN).items() if k != "recipe"
    }
