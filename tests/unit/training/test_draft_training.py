# SPDX-License-Identifier: Apache-2.0
"""Catch draft adapters that learn nothing, that change the frozen model, or that serving and peft
cannot read."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from unit.training.training_runs import (
    assert_same,
    config,
    draft_settings,
    losses,
    settings,
    write_checkpoint,
)
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.twin import make_twin
from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.data import load_samples
from vllm_layerskip.training.drafts.loss import TargetPass, compare
from vllm_layerskip.training.drafts.memory import Said, TargetMemory
from vllm_layerskip.training.drafts.rows import HeadRows
from vllm_layerskip.training.drafts.scores import hold_out, summarize
from vllm_layerskip.training.drafts.trainer import REMEMBERED, DraftTrainer
from vllm_layerskip.training.drafts.translator import SLOWER, _Moments
from vllm_layerskip.training.model import load_tokenizer
from vllm_layerskip.training.rank import train_here
from vllm_layerskip.training.run import train
from vllm_layerskip.twins.adapter import AdapterWeights, read_draft_adapter
from vllm_layerskip.twins.digest import checkpoint_digest

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

EXIT_LAYER = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"), initializer_range=0.2)


@pytest.fixture
def make(tmp_path, base, texts):
    """``make(**sections)``: the config of an adapter that is written below ``tmp_path``."""
    return lambda **sections: TrainConfig.from_dict(
        draft_settings(tmp_path, base, texts, **sections)
    )


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def record_of(folder):
    return json.loads((folder / "layerskip_adapter.json").read_text())


LONGER = {"max_steps": 60, "learning_rate": 1e-2, "logging_steps": 10, "save_steps": 60}


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, texts):
    """A run that has time to learn: its folder, and the trainer it leaves."""
    folder = tmp_path_factory.mktemp("run")
    recipe = {"distill": "both", "final_norm": True}
    values = draft_settings(folder, base, texts, recipe=recipe, training=LONGER)
    trainers = []
    train_here(TrainConfig.from_dict(values), prepare=trainers.append)
    return folder / "adapter", trainers[0]


def test_agreement_with_the_last_layer_rises(run):
    scores = record_of(run[0])["scores"]
    assert scores["after"]["agreement"] > scores["before"]["agreement"] + 0.1
    assert scores["after"]["acceptance_length"] > scores["before"]["acceptance_length"]


def test_a_teacher_that_says_something_else_teaches_nothing(make, monkeypatch):
    """The negative control: its states, but those of other positions."""
    own = TargetPass.run

    def shuffled(self, model, inputs):
        own(self, model, inputs)
        if model.training:
            order = torch.randperm(len(self.states), generator=torch.Generator().manual_seed(0))
            self.states = self.states[order]

    monkeypatch.setattr(TargetPass, "run", shuffled)
    shorter = {**LONGER, "max_steps": 30}
    scores = record_of(train(make(recipe={"distill": "both"}, training=shorter)))["scores"]
    assert scores["after"]["agreement"] <= scores["before"]["agreement"] + 0.05


def test_without_a_learning_rate_nothing_changes(make):
    folder = train(make(training={"learning_rate": 0.0}))
    scores = record_of(folder)["scores"]
    assert scores["after"] == scores["before"]
    assert all(not w.any() for name, w in weights_of(folder).items() if "lora_B" in name)


def test_the_frozen_model_is_what_it_was_bit_for_bit(run, base):
    stored = load_file(base / "model.safetensors")
    inside = {
        name.replace(".base_layer", "").replace("norm.original_module", "norm"): weight
        for name, weight in run[1].causal_lm.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name and name != "lm_head.weight"
    }
    assert_same(inside, stored)


def test_only_layers_before_the_exit_have_adapters(run):
    names = {name.removeprefix("base_model.model.") for name in weights_of(run[0])}
    linear = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
    assert names == {"model.norm.weight"} | {
        f"model.layers.{layer}.{module}_proj.lora_{part}.weight"
        for layer in range(EXIT_LAYER)
        for module in (*linear, "mlp.down")
        for part in "AB"
    }


def test_peft_reads_the_folder_and_predicts_what_was_trained(run, base):
    folder, trainer = run
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, folder).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        trained = trainer.model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, trained)
        with loaded.disable_adapter():
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
            assert torch.equal(loaded(ids).logits, plain)
        assert not torch.equal(trained, plain)


def test_serving_reads_the_folder_and_merges_what_was_trained(run, base):
    folder, trainer = run
    adapter = read_draft_adapter(
        folder,
        "--draft-adapter adapter",
        hf_config=AutoConfig.from_pretrained(base),
        base_name=str(base),
        num_layers=4,
        base_folder=base,
        exit_layer=EXIT_LAYER,
    )
    assert (adapter.exit_layer, adapter.num_layers) == (EXIT_LAYER, EXIT_LAYER)
    weights = AdapterWeights(adapter)
    modules = dict(trainer.causal_lm.named_modules())
    assert len(weights.module_names) == 7 * EXIT_LAYER
    for name in weights.module_names:
        torch.testing.assert_close(
            weights.delta(name), modules[name].get_delta_weight("default").detach()
        )
    norm = modules["model.norm"].modules_to_save["default"].weight
    assert torch.equal(weights.final_norm(), norm.detach())
    assert not torch.equal(norm, modules["model.norm"].original_module.weight)


def test_the_record_and_the_card_say_what_it_is_for(run, base):
    record, card = record_of(run[0]), (run[0] / "README.md").read_text()
    assert record["base_model"] == str(base)
    assert record["base_digest"] == checkpoint_digest(base)
    assert record["exit_layer"] == EXIT_LAYER
    for text in (str(base), record["base_digest"], "E = 2", "r = 16", "a final norm of its own"):
        assert text in card
    assert f"{record['scores']['after']['agreement']:.1%}" in card
    assert f"--exit-layer {EXIT_LAYER} --draft-adapter adapter" in card
    assert {path.name for path in run[0].iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "layerskip_adapter.json",
    }


@pytest.mark.parametrize("distill", ["kl", "argmax", "both"])
def test_what_is_learnt_is_what_the_recipe_says(make, tmp_path, distill):
    train(make(recipe={"distill": distill}, training={"max_steps": 1}))
    history = json.loads((tmp_path / "adapter.run" / "trainer_state.json").read_text())
    logged = history["log_history"][0]
    kl, cross_entropy = logged["kl"], logged["argmax_loss"]
    expected = {"kl": kl, "argmax": cross_entropy, "both": kl + cross_entropy}[distill]
    assert logged["loss"] == pytest.approx(expected, rel=0.05)  # Labels of first tokens count.
    assert 0 <= logged["agreement"] <= 1
    assert logged["tokens_per_s"] > 0
    assert logged["peak_memory_gib"] > 0


def test_the_comparison_is_the_formula_and_its_chunks_make_no_difference(base):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    drafts = torch.randn(20, 32, dtype=torch.float64, requires_grad=True)
    target = torch.randn(20, 32, dtype=torch.float64)
    positions = torch.tensor([1, 2, 5, 8, 13, 19])
    loss, kl, cross_entropy, matches = compare(
        model, drafts, target, positions, "both", chunk_tokens=4
    )
    loss.backward()
    gradient, drafts.grad = drafts.grad, None

    own = model.lm_head(model.model.norm(drafts[positions])).log_softmax(-1)
    taught = model.lm_head(target[positions]).log_softmax(-1)
    expected_kl = (taught.exp() * (taught - own)).sum()
    expected = -own[torch.arange(6), taught.argmax(-1)].sum()
    tolerance = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}  # It computes in float32.
    torch.testing.assert_close(kl, expected_kl, **tolerance)
    torch.testing.assert_close(cross_entropy, expected, **tolerance)
    assert torch.equal(matches, own.argmax(-1) == taught.argmax(-1))
    (expected_kl + expected).backward()
    torch.testing.assert_close(gradient, drafts.grad, **tolerance)
    assert not gradient[0].any()
    assert isinstance(model.model.norm, type(model.model.layers[0].input_layernorm))


def test_drafts_run_no_layer_after_the_exit(make, monkeypatch):
    """Per step one pass of the frozen model runs all layers, one of drafts the first E."""
    calls = [0] * 4
    trainers = []

    def count(trainer):
        trainers.append(trainer)
        for index, layer in enumerate(trainer.causal_lm.model.layers):
            layer.mlp.register_forward_hook(
                lambda *_args, index=index: calls.__setitem__(index, calls[index] + 1)
            )

    monkeypatch.setattr("vllm_layerskip.training.drafts.run.score", lambda *_args: SCORES)
    train_here(make(training={"max_steps": 3}), prepare=count)
    assert calls == [6, 6, 3, 3]


SCORES = {
    "num_speculative_tokens": 3,
    "num_tokens": 1,
    "before": {"agreement": 0.0, "acceptance_length": 1.0},
    "after": {"agreement": 0.0, "acceptance_length": 1.0},
}


def test_texts_to_evaluate_on_are_what_it_is_scored_on(make, texts, tmp_path):
    folder = train(make(data={"eval": {"files": [str(texts)], "max_samples": 5}}))
    scores = record_of(folder)["scores"]
    assert (scores["num_samples"], scores["num_tokens"]) == (5, 5 * 31)
    history = json.loads((tmp_path / "adapter.run" / "trainer_state.json").read_text())
    evaluated = [entry for entry in history["log_history"] if "eval_loss" in entry][-1]
    assert evaluated["eval_agreement"] == pytest.approx(scores["after"]["agreement"], abs=0.05)
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_kl"], rel=0.05)


def test_a_single_sample_leaves_nothing_to_score_on(make):
    with pytest.raises(UserError, match=r"data.train: it makes one sample.*data.eval"):
        train(make(data={"train": {"files": make().data.train.files, "max_samples": 1}}))


# --- Scores


def test_a_walk_through_matches_by_hand():
    """K = 2: row 0 has the drafts where steps begin at even positions, row 1 at odd ones."""
    matches = np.array([[1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0]], dtype=bool)
    # From 0: both of (0, 1) match, 3 tokens. From 3: row 1 misses at 3, 1 token. From 4: row 0 has
    # both of (4, 5), 3 tokens. Position 7 is the end.
    scores = summarize([matches], [np.ones(7, dtype=bool)])
    assert scores.acceptance_length == pytest.approx((3 + 1 + 3) / 3)
    assert scores.agreement == pytest.approx(9 / 14)
    # Two responses: (0, 1), then from 3 a miss, from 4 two matches.
    counted = np.array([1, 1, 0, 1, 1, 1, 0], dtype=bool)
    assert summarize([matches], [counted]).acceptance_length == pytest.approx((3 + 1 + 3) / 3)
    short = np.array([1, 0, 0, 0, 0, 0, 0], dtype=bool)
    assert np.isnan(summarize([matches], [short]).acceptance_length)


# --- As other runs


class _Interrupt(TrainerCallback):
    def on_step_end(self, _args, state, _control, **_kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["final_norm", "exit_translator"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make, tmp_path, monkeypatch, part):
    sections = {"recipe": {part: True}, "lora": {"r": 4, "lora_dropout": 0.1}}
    whole = train(make(**sections, output={"folder": str(tmp_path / "whole")}))
    with pytest.raises(KeyboardInterrupt):
        train_here(make(**sections), prepare=lambda trainer: trainer.add_callback(_Interrupt()))
    with pytest.raises(UserError, match="recipe.distill was 'kl' and is 'both'"):
        train(make(**{**sections, "recipe": {"distill": "both"}}), resume=True)
    with monkeypatch.context() as patch:  # The translator is not fitted anew.
        patch.setattr(DraftTrainer, "begin", lambda _self: pytest.fail("begun again"))
        resumed = train(make(**sections), resume=True)
    assert losses(tmp_path / "adapter.run") == losses(tmp_path / "whole.run")
    assert_same(weights_of(resumed), weights_of(whole))
    for name in ("adapter_config.json", "layerskip_adapter.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_other_ways_to_train_give_the_same_adapter(make, tmp_path):
    plain = train(make())
    for name, training, tolerance in (
        ("bf16", {"bf16": True}, 2e-2),
        ("checkpointing", {"gradient_checkpointing": True}, 1e-4),
        ("accumulated", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 1e-4),
    ):
        other = train(make(training=training, output={"folder": str(tmp_path / name)}))
        expected = losses(tmp_path / "adapter.run")
        assert losses(tmp_path / f"{name}.run") == pytest.approx(expected, rel=tolerance), name
        assert weights_of(other).keys() == weights_of(plain).keys()


# --- Mistakes


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"recipe": {"target": "drafts"}},
            "recipe.target='drafts' must be one of 'whole', 'frozen'",
        ),
        ({"recipe": {"target": ["frozen"]}}, "recipe.target=.* must be one of"),
        ({"recipe": {"target": "whole"}}, "recipe.exit_layer belongs to recipe.target='frozen'"),
        (
            {"recipe": {"max_layer_dropout": 0.1}},
            "recipe.max_layer_dropout belongs to recipe.target='whole'",
        ),
        ({"recipe": {"distil": "kl"}}, "recipe.distil is no key.*Did you mean distill"),
        ({"recipe": {"distill": "mse"}}, "recipe.distill='mse' must be one of 'kl', 'argmax'"),
        ({"recipe": {"exit_layer": 0}}, r"recipe.exit_layer=0 \(E\) must be at least 1"),
        ({"recipe": {"exit_layer": 4}}, r"recipe.exit_layer=4 \(E\) must be in 1..3"),
        ({"recipe": {"exit_layer": "all"}}, "recipe.exit_layer='all' must be an integer"),
        ({"recipe": {"num_speculative_tokens": 0}}, r"num_speculative_tokens=0 \(K\) must be"),
        ({"output": {"exit_layer": 2}}, "output.exit_layer goes into .*Use recipe.exit_layer"),
        ({"output": {"num_speculative_tokens": 2}}, "Use recipe.num_speculative_tokens"),
        ({"lora": {"r": 0}}, "lora.r=0 must be an integer of at least 1"),
        ({"lora": {"r": "16"}}, "lora.r='16' must be an integer of at least 1"),
        ({"lora": {"lora_alpha": "x"}}, "lora.lora_alpha='x' must be a number above 0"),
        ({"lora": {"lora_dropout": 1}}, "lora.lora_dropout=1 must be a number from 0 to below 1"),
        ({"lora": {"use_dora": True}}, "lora.use_dora must be one of lora_alpha, .*merges plain"),
        ({"lora": {"layers_to_transform": [3]}}, "lora.layers_to_transform must be one of"),
        ({"lora": {"target_modules": ["q_proj", "qproj"]}}, "lora.target_modules=.*q_proj"),
        ({"lora": {"target_modules": []}}, "lora.target_modules=.*must name linear layers"),
        (
            {"model": {"attn_implementation": "flash_attention_2"}},
            "model.attn_implementation='flash_attention_2' must be one of 'sdpa', 'eager'",
        ),
        (
            {"model": {"path": None, "model_type": "llama", "tokenizer": "x"}},
            "model.path is missing: recipe.target='frozen'",
        ),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(make, sections, expected, monkeypatch):
    monkeypatch.setattr(
        "vllm_layerskip.training.rank.load_model", lambda *_args: pytest.fail("loaded")
    )
    with pytest.raises(UserError, match=expected):
        train(make(**sections))


def test_what_is_missing_is_named(tmp_path, base, texts):
    values = settings(tmp_path, base, texts)
    values |= {"recipe": {"target": "frozen"}, "output": {"folder": str(tmp_path / "adapter")}}
    with pytest.raises(UserError, match="recipe.exit_layer is missing"):
        TrainConfig.from_dict(values)


def test_a_config_survives_its_own_dictionary(make):
    plan = make(lora={"r": 4}, recipe={"final_norm": True})
    assert TrainConfig.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_whole_is_the_default_target(tmp_path, base, texts):
    plan = config(tmp_path, base, texts)
    assert config(tmp_path, base, texts, recipe={"target": "whole"}) == plan


def test_the_trainer_refuses_what_would_bypass_its_loss(run):
    trainer = run[1]
    with pytest.raises(ValueError, match="exit_layer=4"):
        DraftTrainer(
            model=trainer.model,
            args=trainer.args,
            recipe=type(trainer.recipe)(exit_layer=4),
        )


def test_with_a_draft_vocabulary_both_are_compared_among_its_tokens(base):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    drafts = torch.randn(20, 32, dtype=torch.float64, requires_grad=True)
    target = torch.randn(20, 32, dtype=torch.float64)
    listed, positions = list(range(0, model.config.vocab_size, 2)), torch.arange(20)
    tokens = model.lm_head(target).argmax(-1)
    head = model.lm_head
    loss, kl, cross_entropy, matches = compare(
        model, drafts, target, positions, "both", HeadRows(model, listed), tokens, chunk_tokens=6
    )
    loss.backward()
    gradient, drafts.grad = drafts.grad, None
    assert model.lm_head is head

    own = model.lm_head(model.model.norm(drafts))[:, listed].log_softmax(-1)
    taught = model.lm_head(target)[:, listed].log_softmax(-1)
    even = tokens % 2 == 0
    assert 0 < even.sum() < 20
    expected_kl = (taught.exp() * (taught - own)).sum()
    expected = -own[even, tokens[even] // 2].sum()
    tolerance = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(kl, expected_kl, **tolerance)
    torch.testing.assert_close(cross_entropy, expected, **tolerance)
    assert torch.equal(matches, own.argmax(-1) * 2 == tokens)
    (expected_kl + expected).backward()
    torch.testing.assert_close(gradient, drafts.grad, **tolerance)


def test_a_draft_vocabulary_of_all_tokens_changes_nothing(make, tmp_path, base):
    size = AutoConfig.from_pretrained(base).vocab_size
    (tmp_path / "all.json").write_text(json.dumps(list(range(size))))
    folder = train(make())
    expected = weights_of(folder), record_of(folder)["scores"]
    recipe = {"draft_vocab": str(tmp_path / "all.json")}
    folder = train(make(recipe=recipe, output={"folder": str(tmp_path / "listed")}))
    assert record_of(folder)["scores"] == expected[1]
    for name, weight in weights_of(folder).items():
        torch.testing.assert_close(weight, expected[0][name])


def test_a_token_that_is_not_listed_is_no_match(make, tmp_path):
    (tmp_path / "few.json").write_text("[3, 4]")
    folder = train(make(recipe={"draft_vocab": str(tmp_path / "few.json")}))
    scores = record_of(folder)["scores"]
    assert scores["after"]["agreement"] < 0.5  # Any two tokens are a small part of the text.
    assert record_of(folder)["recipe"]["draft_vocab"] == "draft_vocab.json"
    assert json.loads((folder / "draft_vocab.json").read_text()) == [3, 4]
    assert "--draft-vocab adapter/draft_vocab.json" in (folder / "README.md").read_text()


def test_what_the_target_said_is_remembered(make, tmp_path, monkeypatch):
    """The late layers see each sample once, and training is what it was."""
    calls = [0] * 4

    def count(trainer):
        for index, layer in enumerate(trainer.causal_lm.model.layers):
            layer.mlp.register_forward_hook(
                lambda *_args, index=index: calls.__setitem__(index, calls[index] + 1)
            )

    monkeypatch.setattr("vllm_layerskip.training.drafts.run.score", lambda *_args: SCORES)
    data, training = {"max_samples": 8}, {"max_steps": 8, "per_device_train_batch_size": 4}
    folders = []
    for remember in (False, True):
        values = make(
            recipe={"remember_target": remember},
            training=training,
            output={"folder": str(tmp_path / str(remember))},
        )
        train_data = dataclasses.replace(values.data.train, **data)
        values = dataclasses.replace(
            values, data=dataclasses.replace(values.data, train=train_data)
        )
        calls[:] = [0] * 4
        folders.append(train_here(values, prepare=count))
        # 7 samples, since one is held out: two batches an epoch, which end one epoch unevenly.
        late = 8 if not remember else 2
        assert calls == [16, 16, late, late]
        assert not (values.output.resolved_run_folder / REMEMBERED).exists()
    for name, weight in weights_of(folders[0]).items():
        torch.testing.assert_close(weight, weights_of(folders[1])[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1, 99999999]", "99999999"),
        ("weights", "token ids"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_draft_vocabulary_is_told_before_weights_load(make, tmp_path, content, told):
    file = tmp_path / "vocab.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=told) as error:
        train(make(recipe={"draft_vocab": str(file)}))
    assert str(error.value).startswith("recipe.draft_vocab=")


def test_a_translator_is_the_least_squares_map_before_anything_is_trained(make, base):
    """Without a learning rate what is written is the fit, and it is better than none."""
    folder = train(make(recipe={"exit_translator": True}, training={"learning_rate": 0.0}))
    scores = record_of(folder)["scores"]
    assert scores["after"]["agreement"] > scores["before"]["agreement"] + 0.05
    adapter = read_draft_adapter(
        folder, "--draft-adapter", hf_config=AutoConfig.from_pretrained(base), base_name="b",
        num_layers=4, base_folder=base, exit_layer=EXIT_LAYER,
    )  # fmt: skip
    found = AdapterWeights(adapter).translator()
    assert "translator" in (folder / "README.md").read_text()

    settings = make(recipe={"exit_translator": True})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    samples = load_samples(settings.data.train, settings.data, load_tokenizer(settings.model), "")
    samples, _ = hold_out(samples, "")
    exits, lasts = [], []
    for sample in samples:
        with torch.no_grad():
            states = model.model(
                torch.tensor([sample["input_ids"]]), output_hidden_states=True
            ).hidden_states
        counted = torch.tensor(sample["labels"])[1:] != -100
        exits.append(model.model.norm(states[EXIT_LAYER][0, :-1][counted]).detach().double())
        lasts.append(states[-1][0, :-1][counted].double())
    x, y = torch.cat(exits), torch.cat(lasts)
    expected = torch.linalg.lstsq(x, y).solution.T
    residual, best = (x @ found.double().T - y).norm(), (x @ expected.T - y).norm()
    assert residual <= 1.01 * best < 0.9 * (x - y).norm()


def test_what_is_trained_beside_a_bfloat16_model_is_float32(make, monkeypatch):
    """In bfloat16 the translator's small steps would round away."""
    before = {}

    def keep(self, own=DraftTrainer.begin):
        said = own(self)
        norm = self.causal_lm.model.norm.modules_to_save["default"]
        before.update({name: weight.clone() for name, weight in norm.state_dict().items()})
        return said

    monkeypatch.setattr(DraftTrainer, "begin", keep)
    trainers = []
    plan = make(
        model={"dtype": "bfloat16"},
        recipe={"exit_translator": True},
        training={"bf16": True, "max_steps": 6, "learning_rate": 1e-3},
    )
    train_here(plan, prepare=trainers.append)
    norm = trainers[0].causal_lm.model.norm
    assert norm.original_module.weight.dtype == torch.bfloat16
    for name, weight in norm.modules_to_save["default"].state_dict().items():
        assert weight.dtype == torch.float32
        assert (weight != before[name]).float().mean() > 0.9, name


def test_a_fit_without_data_is_the_identity():
    moments = _Moments(8, torch.device("cpu"))
    assert torch.equal(moments.solve(), torch.eye(8, dtype=torch.float64))
    moments.add(torch.eye(8)[:3], torch.eye(8)[1:4])
    found = moments.solve()
    assert torch.allclose(
        found @ torch.eye(8, dtype=torch.float64)[0], torch.eye(8).double()[1], atol=0.01
    )
    assert torch.equal(found[:, 5], torch.eye(8).double()[5])  # What no data told.


def test_a_translator_is_trained_and_read_by_serving(make, base, tmp_path):
    trainers = []
    recipe = {"exit_translator": True, "distill": "both"}
    folder = train_here(make(recipe=recipe, training={"max_steps": 4}), prepare=trainers.append)
    norm = trainers[0].causal_lm.model.norm
    trained = norm.modules_to_save["default"]
    saved = weights_of(folder)
    assert torch.equal(
        saved["base_model.model.model.norm.translator.weight"], trained.translator.weight.detach()
    )
    assert not hasattr(norm.original_module, "translator")
    rates = {
        id(parameter): group["initial_lr"]
        for group in trainers[0].optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates.pop(id(trained.translator.weight)) == pytest.approx(SLOWER * max(rates.values()))
    assert len(set(rates.values())) == 1
    assert len(rates) == 2 * 7 * EXIT_LAYER + 1
    # The twin of `eval` predicts what was trained.
    adapter = read_draft_adapter(
        folder, "--draft-adapter", hf_config=AutoConfig.from_pretrained(base), base_name="b",
        num_layers=4, base_folder=base, exit_layer=EXIT_LAYER,
    )  # fmt: skip
    twin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    make_twin(twin, "none", adapter)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        own = trainers[0].model.eval()(ids).logits
        torch.testing.assert_close(twin(ids).logits, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "training",
    [{"fsdp": True}, {"deepspeed": "ds.json"}, {"fp16": True}],
    ids=lambda value: [*value][0],
)
def test_ways_to_train_that_nobody_has_seen_work_are_refused(make, training):
    with pytest.raises(
        UserError, match=f"training.{next(iter(training))}=.*recipe.target='frozen'"
    ):
        make(training=training)


def test_samples_of_the_same_tokens_and_other_labels_are_told_apart(tmp_path):
    memory = TargetMemory(tmp_path / "target")
    ids, labels = torch.arange(6)[None], torch.arange(6)[None]
    said = Said(torch.randn(1, 6, 4), torch.arange(6)[None])
    memory.keep({"input_ids": ids, "labels": labels}, said)
    # Another process of the run finds it, too.
    found = TargetMemory(tmp_path / "target").recall({"input_ids": ids, "labels": labels})
    assert torch.equal(found.states, said.states)
    assert torch.equal(found.tokens, said.tokens)
    other = labels.masked_fill(labels < 2, -100)
    assert memory.recall({"input_ids": ids, "labels": other}) is None
    # The same sample, padded in another batch.
    mask = torch.tensor([[1] * 6 + [0] * 3])
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (0, 3)),
        "labels": torch.nn.functional.pad(labels, (0, 3), value=-100),
        "attention_mask": mask,
    }
    found = memory.recall(padded)
    assert found.states.shape == (1, 9, 4)
    assert torch.equal(found.states[:, :6], said.states)
    memory.forget()
    assert memory.recall(padded) is None
    assert os.listdir(tmp_path) == []
