# SPDX-License-Identifier: Apache-2.0
"""Catch runs that do not go on after an interruption as if there had been none, that are resumed as
other runs, or that leave half a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from transformers import AutoTokenizer, TrainerCallback

from unit.training.training_runs import OFF, assert_same, losses, settings, weights_of
from vllm_layerskip.commands.main import main
from vllm_layerskip.config.options import CONFIG_BLOCK
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.run import train
from vllm_layerskip.training.trainer import LayerSkipTrainer

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


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
