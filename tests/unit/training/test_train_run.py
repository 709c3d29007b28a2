# SPDX-License-Identifier: Apache-2.0
"""Catch runs that train something else than plain transformers would where the recipe is off, that
do not go on after an interruption as if there had been none, or that leave half a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from unit.training.training_runs import (
    NUM_LAYERS,
    config,
    losses,
    settings,
    write_checkpoint,
    write_texts,
)
from vllm_layerskip.commands.main import main
from vllm_layerskip.config.options import CONFIG_BLOCK, resolve_options
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.atomic_saves import replace_folder
from vllm_layerskip.training.config import TrainConfig
from vllm_layerskip.training.data import Collator, load_samples
from vllm_layerskip.training.recipe import Recipe
from vllm_layerskip.training.run import make_arguments, train
from vllm_layerskip.training.trainer import LayerSkipTrainer

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

OFF = {"max_layer_dropout": 0.0, "exit_loss_scale": 0.0, "rotation": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture
def make(tmp_path, base, texts):
    """``make(**sections)``: a config that writes below ``tmp_path``."""
    return lambda **sections: config(tmp_path, base, texts, **sections)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


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
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        tmp_path / "model.run" / "checkpoint-6",
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


# --- Interruptions


class _Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, _args, state, _control, **_kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted_at(monkeypatch):
    """``interrupted_at(step)``: runs end there as by Ctrl-C."""

    def set_step(step):
        original = LayerSkipTrainer.train

        def interrupted(self, *args, **kwargs):
            self.add_callback(_Interrupt(step))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(LayerSkipTrainer, "train", interrupted)

    return set_step


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"recipe": {"curriculum": "gradual", "rotation": 1}},
        {"training": {"gradient_accumulation_steps": 2}},
        {"lora": {"r": 4, "lora_dropout": 0.1}},
    ],
    ids=["rotational", "gradual", "accumulated", "lora"],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    make, tmp_path, sections, monkeypatch, interrupted_at
):
    whole = train(make(**sections, output={"folder": str(tmp_path / "whole")}))
    interrupted_at(5)
    with pytest.raises(KeyboardInterrupt):
        train(make(**sections))
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="--resume to go on"):
        train(make(**sections))
    resumed = train(make(**sections), resume=True)
    assert losses(tmp_path / "model.run") == losses(tmp_path / "whole.run")
    assert_same(weights_of(whole), weights_of(resumed))


@pytest.mark.slow
def test_a_killed_process_loses_the_steps_since_its_last_save_alone(
    base, texts, tmp_path, make, cache
):
    training = {"max_steps": 40, "save_steps": 2, "logging_steps": 1}
    whole = train(make(training=training, output={"folder": str(tmp_path / "whole")}))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, base, texts, training=training)))
    command = [sys.executable, "-m", "vllm_layerskip.commands.main", "train", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache)}
    process = subprocess.Popen(command, env=environment)
    run_folder = tmp_path / "model.run"
    while not list(run_folder.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model").exists()
    assert len(list(run_folder.glob("checkpoint-*"))) < 20
    assert main(["train", "--config", str(path), "--resume"]) == 0
    assert losses(run_folder) == losses(tmp_path / "whole.run")
    assert_same(weights_of(tmp_path / "model"), weights_of(whole))


def test_a_save_that_is_cut_short_leaves_nothing_under_its_name(make, tmp_path, monkeypatch):
    whole = train(make(output={"folder": str(tmp_path / "whole")}))
    save = LayerSkipTrainer._save_rng_state

    def fails_at_step_4(self, output_dir):
        if self.state.global_step == 4:
            raise KeyboardInterrupt  # Model and optimizer are written by now.
        return save(self, output_dir)

    monkeypatch.setattr(LayerSkipTrainer, "_save_rng_state", fails_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        train(make())
    run_folder = tmp_path / "model.run"
    assert sorted(path.name for path in run_folder.glob("checkpoint*")) == ["checkpoint-2"]
    monkeypatch.undo()
    assert_same(weights_of(train(make(), resume=True)), weights_of(whole))
    assert not list(run_folder.glob(".unfinished*"))


def test_a_last_save_that_is_cut_short_leaves_the_old_checkpoint(make, tmp_path, monkeypatch):
    before = weights_of(train(make()))

    def fails(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        type(AutoTokenizer.from_pretrained(make().model.path)), "save_pretrained", fails
    )
    with pytest.raises(KeyboardInterrupt):
        train(make(recipe=OFF, training={"save_strategy": "no"}), overwrite=True)
    monkeypatch.undo()
    assert_same(weights_of(tmp_path / "model"), before)
    AutoTokenizer.from_pretrained(tmp_path / "model")


def test_the_best_checkpoint_is_found_under_its_final_name(make, tmp_path, texts):
    train(
        make(
            data={"eval": {"files": [str(texts)]}},
            training={"eval_steps": 2, "load_best_model_at_end": True},
        )
    )
    state = json.loads((tmp_path / "model.run" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("model.run/checkpoint-6")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"recipe": {"rotation": 3}}, "recipe.rotation was 2 and is 3"),
        ({"recipe": {"exit_loss_scale": 0.5}}, "recipe.exit_loss_scale was 1.0 and is 0.5"),
        ({"recipe": {"exit_layers": [2]}}, r"recipe.exit_layers was None and is \[2\]"),
        ({"training": {"max_steps": 8}}, "training.max_steps was 6 and is 8"),
        ({"training": {"per_device_train_batch_size": 2}}, "samples per step was 4 and is 2"),
        ({"data": {"seq_len": 16}}, "data.seq_len was 32 and is 16"),
    ],
)
def test_a_resume_as_another_run_is_refused(
    make, monkeypatch, interrupted_at, sections, expected, tmp_path
):
    interrupted_at(3)
    with pytest.raises(KeyboardInterrupt):
        train(make())
    monkeypatch.undo()
    if "exit_layers" in expected:
        sections["recipe"]["rotation"] = 2
    with pytest.raises(UserError, match=expected) as error:
        train(make(**sections), resume=True)
    assert "Set them back to resume it, or start anew with --overwrite" in str(error.value)


def test_resume_without_a_checkpoint_starts(make, tmp_path):
    assert train(make(), resume=True).is_dir()
    assert len(losses(tmp_path / "model.run")) == 6


def test_what_is_there_is_only_replaced_when_asked(make, tmp_path):
    folder = train(make())
    with pytest.raises(UserError, match="output.folder: .*model exists.*--overwrite"):
        train(make(), resume=True)
    train(make(recipe=OFF), overwrite=True)
    assert json.loads((folder / "config.json").read_text())[CONFIG_BLOCK]["recipe"]["rotation"] == 1


def test_a_folder_of_something_else_is_never_emptied(make, tmp_path):
    (tmp_path / "model.run").mkdir()
    (tmp_path / "model.run" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not of a training run"):
        train(make(), overwrite=True)
    assert (tmp_path / "model.run" / "thesis.tex").exists()


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
    assert error.startswith("vllm-layerskip train: error: output.folder:")
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
        ({"lora": {"r": 0}}, "lora: "),
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
