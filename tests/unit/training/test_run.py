# SPDX-License-Identifier: Apache-2.0
"""Catch runs that train something else than plain transformers would where the recipe is off, or
whose checkpoint is no ordinary one."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from unit.training.training_runs import (
    NUM_LAYERS,
    OFF,
    assert_same,
    losses,
    settings,
    weights_of,
)
from vllm_layerskip.commands.main import main
from vllm_layerskip.config.options import CONFIG_BLOCK, resolve_options
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.arguments import make_arguments
from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.data import Collator, load_samples
from vllm_layerskip.training.output import LORA_FOLDER
from vllm_layerskip.training.recipe import Recipe
from vllm_layerskip.training.run import train
from vllm_layerskip.training.trainer import LayerSkipTrainer

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


# --- Against plain training


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_the_recipe_it_is_plain_training_bit_for_bit(make, base, tmp_path, accumulate):
    training = {"gradient_accumulation_steps": accumulate}
    plan = make(recipe=OFF, training=training)
    trained = train(plan)

    args = TrainingArguments(
        **{**plan.training, "output_dir": str(tmp_path / "plain"), "disable_tqdm": True}
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = Trainer(
        model=model,
        args=args,
        train_dataset=load_samples(plan.data.train, plan.data, tokenizer, "data.train"),
        data_collator=Collator(tokenizer.pad_token_id),
    )
    plain.train()
    expected = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert losses(tmp_path / "model.run") == expected
    state = plain.model.state_dict()
    for name, weight in weights_of(trained).items():
        assert torch.equal(weight, state[name]), name


def test_the_recipe_makes_another_model(make, base, tmp_path):
    trained = weights_of(train(make()))
    plain = weights_of(train(make(recipe=OFF, output={"folder": str(tmp_path / "plain")})))
    assert any(not torch.equal(trained[name], plain[name]) for name in trained)


def test_accumulated_batches_count_by_their_tokens(make, base):
    """Two batches of different numbers of labels weigh as one batch of both."""
    plan = make(recipe={"max_layer_dropout": 0.0})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    args = make_arguments(plan)
    trainer = LayerSkipTrainer(model=model, args=args, recipe=plan.recipe)
    trainer.state.max_steps = 6
    ids = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:2, 4:] = -100
    num_items = (labels[:, 1:] != -100).sum()
    halves = [
        trainer.compute_loss(
            model.train(),
            {"input_ids": ids[part], "labels": labels[part]},
            num_items_in_batch=num_items,
        )
        for part in (slice(0, 2), slice(2, 4))
    ]
    whole = trainer.compute_loss(
        model, {"input_ids": ids, "labels": labels}, num_items_in_batch=num_items
    )
    torch.testing.assert_close(sum(halves), whole)


# --- Output


def test_the_checkpoint_is_an_ordinary_one_that_serving_understands(make, base, tmp_path):
    folder = train(make(output={"dtype": "auto"}))
    stored = json.loads((folder / "config.json").read_text())
    assert stored["architectures"] == ["LlamaForCausalLM"]
    assert stored["use_cache"] is True
    assert stored["dtype"] == "float32"  # The base's.
    options = resolve_options({"model": "[self]"}, NUM_LAYERS, stored[CONFIG_BLOCK])
    assert (options.exit_layer, options.num_speculative_tokens) == (2, 3)
    assert Recipe(**stored[CONFIG_BLOCK]["recipe"]) == make().recipe
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.use_cache
    text = tokenizer("def add_1(left", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=3, do_sample=False).shape[1] > 3
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", "model.run"}
    run_left = {path.name for path in (tmp_path / "model.run").iterdir()}
    assert run_left == {"checkpoint-4", "checkpoint-6", "run.json", "trainer_state.json"}


def test_losses_of_each_exit_are_logged(make, tmp_path, texts, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = make(
        data={"eval": {"files": [str(texts)]}},
        training={"report_to": "tensorboard", "logging_steps": 2, "eval_steps": 6},
    )
    train(plan)
    run_folder = tmp_path / "model.run"
    history = json.loads((run_folder / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    for entry in logged:  # R = 2: within two steps every exit with a weight has had its turn.
        assert {f"exit_{e}_loss" for e in (2, 3, 4)} <= entry.keys()
        assert "exit_1_loss" not in entry
    (evaluated,) = [entry for entry in history if "eval_loss" in entry]
    assert {f"eval_exit_{e}_loss" for e in (1, 2, 3, 4)} <= evaluated.keys()
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_exit_4_loss"], rel=0.02)
    assert "exit_2_loss" in capsys.readouterr().out
    (events,) = run_folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"train/exit_2_loss", "train/exit_4_loss", "eval/exit_1_loss"} <= tags


def test_bfloat16_autocast_and_gradient_checkpointing_train(make, tmp_path):
    reference = train(make())
    plain = losses(tmp_path / "model.run")
    for name, options, tolerance in (
        ("bf16", {"bf16": True}, 2e-2),
        ("checkpointing", {"gradient_checkpointing": True}, 1e-4),
    ):
        output = {"folder": str(tmp_path / name)}
        folder = train(make(training=options, output=output))
        assert losses(tmp_path / f"{name}.run") == pytest.approx(plain, rel=tolerance)
        assert weights_of(folder).keys() == weights_of(reference).keys()
        assert not torch.is_autocast_enabled("cpu")


def test_lora_trains_adapters_and_stores_them_merged(make, base, tmp_path):
    lora = {"r": 4, "lora_alpha": 8}
    folder = train(make(lora=lora, training={"learning_rate": 1e-2}))
    merged, before = weights_of(folder), load_file(base / "model.safetensors")
    assert merged.keys() == before.keys()  # An ordinary checkpoint, without peft's names.
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {name for name in merged if "proj" in name}
    assert (tmp_path / "model.run" / "checkpoint-6" / "adapter_model.safetensors").is_file()

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / LORA_FOLDER
    )
    ids = torch.arange(20)[None]
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_model_from_scratch_follows_from_its_shape_and_seed(make, base, tmp_path):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model = {"path": None, "model_type": "qwen3", "config": shape, "tokenizer": str(base)}
    first = train(make(model=model, output={"dtype": "auto"}))
    second = train(make(model=model, output={"dtype": "auto", "folder": str(tmp_path / "b")}))
    assert_same(weights_of(first), weights_of(second))
    stored = json.loads((first / "config.json").read_text())
    assert (stored["model_type"], stored["num_hidden_layers"]) == ("qwen3", 3)
    assert stored["dtype"] == "bfloat16"


# --- The command


def test_the_command_trains_from_a_file(tmp_path, base, texts, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, base, texts)))
    assert main(["train", "--config", str(path)]) == 0
    output = capsys.readouterr().out
    assert "p_max 0.5, e_scale 1.0, rotational, R = 2" in output
    assert f"Wrote {tmp_path / 'model'}" in output
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-layerskip train: error: --config {path}: output.folder:")
    assert len(error.splitlines()) == 1
    assert main(["train", "--config", str(path), "--overwrite", "--resume"]) == 2
    assert main(["train", "--config", str(path), "--num-workers", "0"]) == 2


def test_arguments_reach_the_trainer_and_numbers_may_be_written_as_in_papers(make):
    args = make_arguments(make(training={"learning_rate": "3e-4", "lr_scheduler_type": "cosine"}))
    assert args.learning_rate == 3e-4
    assert args.max_steps == 6
    assert args.save_total_limit == 2


def test_a_config_survives_its_own_dictionary(make):
    plan = make(lora={"r": 4}, recipe={"exit_layers": [2, 3]})
    assert TrainConfig.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"learning_rat": 1}}, "training.learning_rat.*Did you mean learning_rate"),
        ({"training": {"max_steps": "many"}}, "training.max_steps='many' must be a number"),
        ({"training": {"lr_scheduler_type": "magic"}}, "training: .*magic"),
        ({"training": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0.1 must be 0"),
        ({"training": {"torch_compile": True}}, "torch_compile=True must be False"),
        ({"training": {"eval_strategy": "steps", "eval_steps": 2}}, "needs data.eval"),
        ({"lora": {"rank": 4}}, "lora.rank is no key"),
        ({"lora": {"r": 0}}, "lora.r=0 must be an integer of at least 1"),
        ({"lora": {"use_rslora": "no"}}, "lora.use_rslora='no' must be true or false"),
        ({"lora": {"bias": "foo"}}, "lora: "),
        ({"lora": {"target_modules": ["q_proj", 3]}}, "lora: "),
        ({"recipe": {"rotation": 5}}, r"recipe.rotation=5 \(R\) must be at most 4"),
        ({"recipe": {"exit_layers": [9]}}, r"recipe.exit_layers=\[9\] must lie in 2..4"),
        ({"output": {"exit_layer": 4}}, "output.exit_layer=4 must be in 1..3"),
        ({"data": {"seq_len": 65}}, "data.seq_len=65 must be at most 64"),
        ({"data": {"seq_len": 60, "train": {"files": ["EMPTY"]}}}, "data.train: it holds less"),
        (
            {"model": {"path": "/no/such/folder"}},
            "model.path: '/no/such/folder' holds no|tokenizer",
        ),
    ],
)
def test_a_mistake_is_told_before_training(make, tmp_path, base, sections, expected, monkeypatch):
    if "EMPTY" in str(sections):
        (tmp_path / "empty.txt").touch()
        sections["data"]["train"]["files"] = [str(tmp_path / "empty.txt")]
    monkeypatch.setattr(LayerSkipTrainer, "train", lambda *_a, **_k: pytest.fail("trained"))
    with pytest.raises(UserError, match=expected):
        train(make(**sections))


def test_what_is_no_causal_language_model_is_refused(make, base, tmp_path):
    other = tmp_path / "other"
    stored = json.loads((base / "config.json").read_text())
    for architecture, expected in (
        ("LlamaForSequenceClassification", "not a causal language model"),
        ("BertForMaskedLM", "not a causal language model"),
    ):
        other.mkdir(exist_ok=True)
        for file in base.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (other / "config.json").write_text(json.dumps({**stored, "architectures": [architecture]}))
        with pytest.raises(UserError, match=expected) as error:
            train(make(model={"path": str(other)}))
        assert architecture in str(error.value)


def test_a_checkpoint_without_some_weights_is_refused(make, base, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights, such as .*layers.2.mlp.up_proj"):
        train(make(model={"path": str(other)}))
