# SPDX-License-Identifier: Apache-2.0
"""Catch a tuner that misses the best cell, measures what it has, or lets a bad option through.

Engines are replaced at the process boundary by a machine with known costs; the real ones run in
tests/engine/commands/test_tune.py.
"""

import json
import random
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vllm_layerskip
from vllm_layerskip.commands import main as cli
from vllm_layerskip.commands.tune import settings_of
from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning import process_jobs
from vllm_layerskip.tuning.cells import Measurement, append_measurements, load_measurements
from vllm_layerskip.tuning.grid import PLAIN, Grid
from vllm_layerskip.tuning.measured_cells import MeasuredCells
from vllm_layerskip.tuning.settings import ALL, PromptSettings, TuneSettings
from vllm_layerskip.tuning.tune import tune

MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"
ROOT = Path(__file__).parents[3]
NUM_LAYERS = 12
PROMPTS = ("import os", "def f(x):", "class A:", "for i in")


def make_agreement(exit_layers=range(1, NUM_LAYERS), num_answers=24, num_tokens=96, seed=0):
    """Exits that agree the better the deeper they are, and not independently of each other."""
    generator = np.random.default_rng(seed)
    matches = []
    for _ in range(num_answers):
        hardness = generator.random(num_tokens)
        rates = 1 - 0.75 * np.exp(-np.asarray(exit_layers) / 4)
        matches.append(hardness[None, :] < rates[:, None])
    return Agreement(tuple(exit_layers), tuple(matches), 1.0)


class Machine:
    """Measures cells as an engine on a machine with these costs would, noise included."""

    def __init__(self, agreement, noise=0.0, verify=1.05, draft=0.05, layer=0.05, digest="s"):
        self.lengths = agreement.acceptance_lengths(8)
        self.agreement, self.digest = agreement, digest
        self.verify, self.draft, self.layer, self.noise = verify, draft, layer, noise
        self.random = random.Random(0)
        self.asked = []

    def step_ms(self, e, k, batch_size):
        # Not quite linear in what is drafted, and dearer to verify in a large batch.
        verify = self.verify * (1 + 0.02 * batch_size * (k + 1))
        return verify + k * (self.draft + e * self.layer) * (1 + 0.02 * batch_size) + 0.002 * e * e

    def measurement(self, cell, batch_size):
        e, k = cell
        if cell == PLAIN:
            step_ms, length = 1.0 + 0.02 * batch_size, 1.0
        else:
            step_ms = self.step_ms(e, k, batch_size)
            length = self.lengths[self.agreement.exit_layers.index(e), k - 1]
        step_ms *= 1 + self.random.uniform(-self.noise, self.noise)
        speed = 1e3 * batch_size * length / step_ms
        return Measurement(
            self.digest, e, k, batch_size, round(speed, 3), round(step_ms, 4), round(length, 4),
            10, 9, 20, f"{speed:.2f}", "a b c", 1.0,
        )  # fmt: skip

    def measure(self, batch_sizes):
        def measure_cells(cells):
            for cell in cells:
                self.asked.append(cell)
                yield from (self.measurement(cell, batch_size) for batch_size in batch_sizes)

        return measure_cells


def run(tmp_path, machine, grid, num_measured):
    measured = MeasuredCells(tmp_path / "cells.csv", machine.digest, grid.batch_sizes)
    measure = machine.measure(grid.batch_sizes)
    return tune(grid, machine.agreement, measured, measure, num_measured)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "costs",
    [
        {},
        {"draft": 0.3},  # A large head.
        {"layer": 0.02},  # Layers that are cheap beside the rest.
        {"verify": 1.6, "draft": 0.4},  # Overheads as of a small model on a CPU.
    ],
    ids=repr,
)
def test_the_choice_is_within_10_percent_of_the_best_cell_of_a_full_sweep(tmp_path, seed, costs):
    grid = Grid(tuple(range(1, NUM_LAYERS)), tuple(range(1, 9)), (1,))
    agreement = make_agreement(seed=seed)
    chosen = run(tmp_path, Machine(agreement, noise=0.02, **costs), grid, 4).choice
    quiet = Machine(agreement, **costs)
    speeds = {cell: quiet.measurement(cell, 1).tokens_per_s for cell in grid.cells}
    cell = (chosen.exit_layer, chosen.num_speculative_tokens)
    assert speeds[cell] >= 0.9 * max(speeds.values())
    assert chosen.pays == (speeds[cell] > 1.02 * quiet.measurement(PLAIN, 1).tokens_per_s)


def test_a_few_cells_are_measured_and_all_of_them_only_if_asked(tmp_path):
    grid = Grid(tuple(range(1, NUM_LAYERS)), tuple(range(1, 9)), (1, 8))
    machine = Machine(make_agreement())
    result = run(tmp_path, machine, grid, 4)
    assert len(machine.asked) == len(set(machine.asked)) == 1 + 5 + 4
    assert PLAIN in machine.asked
    assert len(result.predictions) == 11 * 8 * 2
    again = Machine(make_agreement())
    assert run(tmp_path, again, grid, 4).choice == result.choice
    assert again.asked == []
    run(tmp_path, again, grid, ALL)
    assert sorted(again.asked) == sorted(set(grid.cells) - set(machine.asked))
    assert len(load_measurements(tmp_path / "cells.csv")) == 2 * (11 * 8 + 1)


def test_predictions_are_near_what_is_measured(tmp_path):
    grid = Grid(tuple(range(1, NUM_LAYERS)), tuple(range(1, 9)), (1, 8))
    result = run(tmp_path, Machine(make_agreement()), grid, 6)
    for (e, k, batch_size), speedup in result.measured_speedups.items():
        assert result.prediction(e, k, batch_size).speedup == pytest.approx(speedup, rel=0.1)


def test_drafting_ends_where_batches_make_it_dear(tmp_path):
    grid = Grid(tuple(range(1, NUM_LAYERS)), tuple(range(1, 9)), (1, 8, 64))
    choice = run(tmp_path, Machine(make_agreement()), grid, 8).choice
    drafts = [entry[2] for entry in choice.schedule]
    assert drafts[0] > 0
    assert drafts[-1] == 0
    assert drafts == sorted(drafts, reverse=True)


# ---- the command ----


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS))
    return path


@pytest.fixture
def fake_processes(monkeypatch):
    """Engines and models of ``process_jobs.run_job`` replaced; returns the requests that came."""
    requests = []

    def run_job(request, device, log):
        requests.append(request)
        job = request["job"]
        if request["kind"] == "agreement":
            agreement = make_agreement(job["exit_layers"])
            agreement.save(Path(request["path"]), job["settings_digest"])
            yield {"num_tokens": agreement.num_tokens}
            return
        machine = Machine(make_agreement(), digest=job["settings_digest"])
        for cell in job["cells"]:
            for batch_size in job["workload"]["batch_sizes"]:
                measurement = machine.measurement(tuple(cell), batch_size)
                yield replace(measurement, outputs=" ".join("abcd")).to_dict()

    monkeypatch.setattr(process_jobs, "run_job", run_job)
    return requests


def command(checkpoint, prompts, tmp_path, *more):
    return cli.main([
        "tune", "--model", str(checkpoint), "--prompts", str(prompts), "--device", "cpu",
        "--results", str(tmp_path / "results"), "--max-tokens", "32", *map(str, more),
    ])  # fmt: skip


def test_the_command_writes_what_auto_reads(checkpoint, prompts, tmp_path, fake_processes, capsys):
    before = json.loads((checkpoint / "config.json").read_text())
    assert command(checkpoint, prompts, tmp_path, "--batch-sizes", "1,8,64") == 0
    after = json.loads((checkpoint / "config.json").read_text())
    assert {k: v for k, v in after.items() if k != "layerskip"} == {
        k: v for k, v in before.items() if k != "layerskip"
    }
    assert after["layerskip"]["recipe"] == before["layerskip"]["recipe"]
    assert json.loads((checkpoint / "config.json.before-tune").read_text()) == before
    options = resolve_options({"model": "[self]"}, NUM_LAYERS, after["layerskip"])
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    choice = report["choice"]
    assert options.exit_layer == choice["exit_layer"]
    assert options.num_speculative_tokens == choice["num_speculative_tokens"]
    schedule = options.vllm_options["num_speculative_tokens_per_batch_size"]
    assert list(map(list, schedule)) == choice["num_speculative_tokens_per_batch_size"]
    assert schedule[-1][1:] == (64, 0)
    shown = capsys.readouterr()
    assert f"vllm serve {checkpoint} --dtype float32 --spec-model '[self]'" in shown.out
    assert "4 of 4" in shown.out
    assert "plain, batch 64" in shown.err
    assert (tmp_path / "results" / "map.png").read_bytes().startswith(b"\x89PNG")
    # One process a cell: plain, 5 of the fit, 4 best.
    cells = [asked["job"]["cells"] for asked in fake_processes if asked["kind"] == "cells"]
    assert all(len(process) == 1 for process in cells)
    assert len(cells) == 1 + 5 + 4

    jobs_before = len(fake_processes)
    assert command(checkpoint, prompts, tmp_path, "--batch-sizes", "1,8,64") == 0
    assert len(fake_processes) == jobs_before, "everything was there"
    assert (
        command(checkpoint, prompts, tmp_path, "--batch-sizes", "1,8,64", "--max-tokens", 40) == 0
    )
    assert len(fake_processes) > jobs_before, "other settings"


def test_other_places_and_none(checkpoint, prompts, tmp_path, fake_processes, capsys):
    before = (checkpoint / "config.json").read_bytes()
    output = tmp_path / "changed.json"
    assert command(checkpoint, prompts, tmp_path, "--output", output) == 0
    assert "layerskip" in json.loads(output.read_text())
    assert command(checkpoint, prompts, tmp_path, "--dry-run", "--map", tmp_path / "m.svg") == 0
    shown = capsys.readouterr().out
    assert "--speculative-config" in shown
    assert '"num_speculative_tokens_per_batch_size"' in shown
    assert "<svg" in (tmp_path / "m.svg").read_text()[:600]
    assert (checkpoint / "config.json").read_bytes() == before
    assert not (checkpoint / "config.json.before-tune").exists()


def test_a_roofline_needs_no_engine_and_kept_statistics_no_weights(
    checkpoint, prompts, tmp_path, fake_processes, capsys
):
    assert command(checkpoint, prompts, tmp_path, "--hardware", "h100", "--dry-run") == 0
    assert [asked["kind"] for asked in fake_processes] == ["agreement"]
    assert fake_processes[0]["job"]["generator"] == "transformers"
    assert "(predicted)" in capsys.readouterr().out
    (checkpoint / "model.safetensors").unlink()
    kept = tmp_path / "results" / "agreement.npz"
    more = ("--hardware", "l4", "--dry-run", "--agreement", kept)
    assert command(checkpoint, prompts, tmp_path, *more) == 0
    assert len(fake_processes) == 1


def test_given_statistics_must_have_the_exit_layers(
    checkpoint, prompts, tmp_path, fake_processes, capsys
):
    make_agreement([2, 3]).save(tmp_path / "kept.npz", "other settings")
    more = ("--hardware", "l4", "--dry-run", "--agreement", tmp_path / "kept.npz")
    assert command(checkpoint, prompts, tmp_path, *more, "--exit-layers", "2-4") == 2
    assert "has no exit layers [4]; it has [2, 3]" in capsys.readouterr().err
    assert command(checkpoint, prompts, tmp_path, *more, "--exit-layers", "3") == 0
    assert fake_processes == []


def test_where_drafting_does_not_pay_the_tool_says_so(
    checkpoint, prompts, tmp_path, fake_processes, capsys, monkeypatch
):
    monkeypatch.setattr(Machine, "step_ms", lambda self, e, k, batch_size: 20.0 + e * k)
    assert command(checkpoint, prompts, tmp_path) == 0
    assert "Drafting does not pay here" in capsys.readouterr().out
    block = json.loads((checkpoint / "config.json").read_text())["layerskip"]
    assert block["num_speculative_tokens_per_batch_size"] == [[1, 1, 0]]
    assert block["num_speculative_tokens"] >= 1


def test_the_commands_defaults_are_the_librarys():
    parser = cli.build_parser()
    args = parser.parse_args(["tune", "--model", "m", "--prompts", "p.jsonl"])
    assert settings_of(args) == TuneSettings("m", PromptSettings(("p.jsonl",)))


def test_a_missing_package_is_named_with_its_extra(
    checkpoint, prompts, tmp_path, capsys, monkeypatch
):
    class LacksNumpy(types.ModuleType):
        def __getattr__(self, name):
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    name = "vllm_layerskip.tuning.plan"
    monkeypatch.setitem(sys.modules, name, LacksNumpy(name))
    assert command(checkpoint, prompts, tmp_path) == 2
    assert "pip install 'vllm-layerskip[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--exit-layers", "0-3"), ("--exit-layers 0-3", "from 1 to 11")),
        (("--exit-layers", "12"), ("--exit-layers 12", "from 1 to 11")),
        (("--exit-layers", "5-3"), ("--exit-layers 5-3", "such as")),
        (("--exit-layers", "a"), ("--exit-layers a", "from 1 to 11")),
        (("--num-speculative-tokens", "0"), ("--num-speculative-tokens 0", "at least 1")),
        (("--num-speculative-tokens", "1-"), ("--num-speculative-tokens 1-", "at least 1")),
        (("--num-speculative-tokens", "31"), ("--max-tokens 32", "Raise it to 33")),
        (("--batch-sizes", "0,4"), ("--batch-sizes 0,4", "at least 1")),
        (("--batch-sizes", ""), ("--batch-sizes", "at least 1")),
        (("--num-prompts", 0), ("--num-prompts 0", "at least 1")),
        (("--max-tokens", 500), ("--max-tokens 500", "takes 512", "Lower")),
        (("--max-prompt-tokens", 1), ("--max-prompt-tokens 1", "Raise it")),
        (("--repeats", 0), ("--repeats 0", "at least 1")),
        (("--hardware", "abacus"), ("--hardware abacus", "NVIDIA H200")),
        (("--map", "map.txt"), ("--map map.txt", ".png")),
        (("--map", "no/such/map.png"), ("--map", "cannot be written")),
        (("--output", "no/such.json"), ("--output", "cannot be written", "--dry-run")),
        (("--prompts", "no.txt"), ("--prompts no.txt", "no such file")),
        (("--model", "no-such-model"), ("--model no-such-model", "no such folder")),
        (("--agreement", "no.npz"), ("--agreement no.npz", "no file of agreement")),
        (("--draft-vocab", "no.json"), ("--draft-vocab", "cannot be read")),
        (("--engine-args", "3"), ("JSON object",)),
        (("--accelerator-type", "H100"), ("--accelerator-type H100 needs --ray",)),
        (("--num-measured", "few"), ("'few'", "'all'")),
    ],
    ids=repr,
)  # fmt: skip
def test_a_bad_option_ends_with_2_and_says_what_to_do(
    checkpoint, prompts, tmp_path, fake_processes, capsys, monkeypatch, more, says
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = (checkpoint / "config.json").read_bytes()
    try:
        status = command(checkpoint, prompts, tmp_path, *more)
    except SystemExit as stop:  # argparse's own errors.
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    for words in says:
        assert words in message
    assert fake_processes == []
    assert (checkpoint / "config.json").read_bytes() == before


def test_a_failing_process_shows_its_error_and_its_log(checkpoint, prompts, tmp_path, capsys):
    """A real process: of a checkpoint that has no weights."""
    (checkpoint / "model.safetensors").unlink()
    more = ("--hardware", "h100", "--dry-run")
    assert command(checkpoint, prompts, tmp_path, *more) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "a process that loads the model failed with exit status 1: OSError: " in message
    assert message.endswith("agreement.log")
    assert "no file named" in message or "model.safetensors" in message


class TestCheckAgainstASweep:
    """benchmarks/pages/check_tuning.py: a good choice passes, a bad one fails."""

    @pytest.fixture
    def check(self, tmp_path):
        def check(pair, speeds, schedule=None, pays=True):
            choice, sweep = tmp_path / "choice", tmp_path / "sweep"
            for folder in (choice, sweep):
                folder.mkdir()
            grid = {"exit_layers": [2, 3], "num_speculative_tokens": [1, 2], "batch_sizes": [1]}
            report = {
                "grid": grid,
                "choice": {
                    "exit_layer": pair[0], "num_speculative_tokens": pair[1], "pays": pays,
                    "num_speculative_tokens_per_batch_size": schedule or [[1, 1, pair[1]]],
                },
                "measured": [{"settings": "s"}],
            }  # fmt: skip
            for folder in (choice, sweep):
                (folder / "report.json").write_text(json.dumps(report))
            one = Machine(make_agreement()).measurement(PLAIN, 1)
            measured = [
                replace(one, exit_layer=e, num_speculative_tokens=k, tokens_per_s=speed)
                for (e, k), speed in speeds.items()
            ]
            # Another run's rows in the same file do not count.
            measured.append(replace(measured[-1], settings_digest="other", tokens_per_s=1e6))
            append_measurements(sweep / "cells.csv", measured)
            command = [sys.executable, "-m", "benchmarks.pages.check_tuning"]
            return subprocess.run(
                [*command, str(choice), str(sweep)], capture_output=True, text=True, check=False
            )

        return check

    SPEEDS = {PLAIN: 100.0, (2, 1): 130.0, (2, 2): 118.0, (3, 1): 116.0, (3, 2): 90.0}

    @pytest.mark.parametrize(("pair", "status"), [((2, 1), 0), ((2, 2), 0), ((3, 1), 1)])
    def test_ten_percent(self, check, pair, status):
        process = check(pair, self.SPEEDS)
        assert process.returncode == status, process.stderr
        assert "best of the sweep E=2 K=1, 130.0 tokens/s (1.300 x plain)" in process.stdout

    def test_where_drafting_does_not_pay_the_pair_is_compared(self, check):
        slow = {cell: speed / 2 for cell, speed in self.SPEEDS.items()} | {PLAIN: 100.0}
        assert check((3, 1), slow, [[1, 1, 0]], pays=False).returncode == 1

    def test_a_sweep_with_holes_is_none(self, check):
        process = check((2, 1), {c: s for c, s in self.SPEEDS.items() if c != (3, 2)})
        assert process.returncode == 2
        assert "The sweep lacks [(3, 2)]" in process.stderr
