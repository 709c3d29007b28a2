# SPDX-License-Identifier: Apache-2.0
"""Catch several processes that train something else than one does at the same global batch, or
that hang because a rank dropped a layer for all of its samples."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unit.training.training_runs import (
    config,
    draft_settings,
    losses,
    settings,
    write_checkpoint,
    write_texts,
)
from vllm_layerskip.errors import UserError
from vllm_layerskip.training.config import Source, TrainConfig
from vllm_layerskip.training.run import train

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

# Dropout draws the same numbers on every rank, so it is not that of one large batch.
SAME_BATCH = {"recipe": {"max_layer_dropout": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_checkpoint(folder / "base")
    write_texts(folder / "texts.jsonl")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """One process, four samples a step."""
    return train(config(folder / "alone", folder / "base", folder / "texts.jsonl", **SAME_BATCH))


@pytest.fixture(scope="module")
def two_processes(folder):
    """``start(name, options, **sections)``: two processes of torchrun, two samples each."""

    def start(name, options=(), settings=settings, **sections):
        training = {"per_device_train_batch_size": 2, **sections.pop("training", {})}
        values = settings(
            folder / name,
            folder / "base",
            folder / "texts.jsonl",
            training=training,
            **sections,
        )
        (folder / name).mkdir(exist_ok=True)
        path = folder / name / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += [
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
        command += ["-m", "vllm_layerskip.commands.main", "train", "--config", str(path), *options]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Path(values["output"]["folder"])

    return start


def _assert_same_run(one, other):
    expected = losses(one.with_name("model.run"))
    assert len(expected) == 6
    assert losses(other.with_name("model.run")) == pytest.approx(expected, rel=2e-5)
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=2e-4)
    config = json.loads((other / "config.json").read_text())
    assert config["layerskip"]["exit_layer"] == 2


def test_two_processes_of_ddp_train_as_one(alone, two_processes):
    _assert_same_run(alone, two_processes("ddp", **SAME_BATCH))


@pytest.mark.slow
def test_two_processes_train_a_draft_adapter_as_one(folder, two_processes):
    """Of six steps, all but the first two find each sample in what either process remembered."""
    plan = draft_settings(folder / "draft", folder / "base", folder / "texts.jsonl")
    alone = train(TrainConfig.from_dict(plan))
    together = two_processes("draft-ddp", settings=draft_settings, recipe={"remember_target": True})
    expected = losses(alone.with_name("adapter.run"))
    assert losses(together.with_name("adapter.run")) == pytest.approx(expected, rel=2e-5)
    weights = load_file(alone / "adapter_model.safetensors")
    others = load_file(together / "adapter_model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=2e-4)
    records = [
        json.loads((made / "layerskip_adapter.json").read_text()) for made in (alone, together)
    ]
    assert records[0]["base_digest"] == records[1]["base_digest"]


@pytest.mark.slow
def test_ranks_drop_the_same_number_of_samples_and_none_hangs(two_processes):
    """At p_max 0.9 a rank drops layers for both of its samples again and again."""
    recipe = {"max_layer_dropout": 0.9, "from_scratch": False}
    trained = two_processes("ddp-dropout", recipe=recipe)
    assert len(losses(trained.with_name("model.run"))) == 6


def test_a_model_that_fsdp_shards_has_the_loss_and_gradients_of_a_whole_one(tmp_path):
    script = Path(__file__).with_name("fsdp_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "rendezvous")],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)


def test_fsdp_on_a_cpu_is_refused(folder):
    """accelerate would ignore it without a word."""
    plan = config(
        folder / "refused", folder / "base", folder / "texts.jsonl", training={"fsdp": True}
    )
    with pytest.raises(UserError, match="training.fsdp needs GPUs"):
        train(plan)


@pytest.mark.slow
def test_two_workers_of_ray_train_as_one(alone, folder, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    try:
        plan = config(
            folder / "ray",
            folder / "base",
            folder / "texts.jsonl",
            training={"per_device_train_batch_size": 2},
            **SAME_BATCH,
        )
        trained = train(plan, num_workers=2)
        _assert_same_run(alone, trained)
        with pytest.raises(UserError, match="--overwrite"):
            train(plan, num_workers=2)
        # A mistake that only the workers see reaches the user as one.
        missing = dataclasses.replace(
            plan,
            data=dataclasses.replace(plan.data, train=Source(files=(str(folder / "none"),))),
        )
        with pytest.raises(UserError, match="data.train.files .*none: there is no such file"):
            train(missing, num_workers=2, overwrite=True)
    finally:
        ray.shutdown()
