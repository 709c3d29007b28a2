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
import torch
from safetensors.torch import save_file

import vllm_layerskip
from vllm_layerskip.commands import main as cli
from vllm_layerskip.commands.tune import settings_of
from vllm_layerskip.config.options import resolve_options
from vllm_layerskip.evaluation.agreement import Agreement
from vllm_layerskip.tuning import process_jobs
from vllm_layerskip.tuning.cells import Measurement, append_measurements, load_measurements
from vllm_layerskip.tuning.drafts import OWN, Draft, agreement_name
from vllm_layerskip.tuning.grid import PLAIN, PLAIN_DECODING, DraftCell, Grid
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


LAYER_COSTS = {"none": 1.0, "int4": 0.3, "int8": 0.6, "fp8": 0.7}
"""What a layer of each draft costs, as a share of the target's own."""
INT4, INT8 = Draft("int4"), Draft("int8")


class Machine:
    """Measures cells as an engine on a machine with these costs would, noise included.

    ``agreements`` has those of drafts that do not agree with the target as ``agreement`` does.
    """

    def __init__(
        self, agreement, noise=0.0, verify=1.05, draft=0.05, layer=0.05, digest="s",
        agreements=None, layer_costs=None,
    ):  # fmt: skip
        self.agreement, self.agreements, self.digest = agreement, agreements or {}, digest
        self.layer_costs = layer_costs or LAYER_COSTS
        self.lengths = {
            draft: of.acceptance_lengths(8)
            for draft, of in {OWN: agreement, **self.agreements}.items()
        }
        self.verify, self.draft, self.layer, self.noise = verify, draft, layer, noise
        self.random = random.Random(0)
        self.asked = []

    def step_ms(self, e, k, batch_size, layer_cost=1.0):
        # Not quite linear in what is drafted, and dearer to verify in a large batch.
        verify = self.verify * (1 + 0.02 * batch_size * (k + 1))
        drafts = k * (self.draft + e * self.layer * layer_cost) * (1 + 0.02 * batch_size)
        return verify + drafts + 0.002 * e * e * layer_cost

    def measurement(self, cell, batch_size):
        draft, (e, k) = cell if isinstance(cell, DraftCell) else (OWN, cell)
        if k == 0:
            step_ms, length = 1.0 + 0.02 * batch_size, 1.0
        else:
            agreement = self.agreements.get(draft, self.agreement)
            step_ms = self.step_ms(e, k, batch_size, self.layer_costs[draft.quantization])
            lengths = self.lengths.get(draft, self.lengths[OWN])
            length = lengths[agreement.exit_layers.index(e), k - 1]
        step_ms *= 1 + self.random.uniform(-self.noise, self.noise)
        speed = 1e3 * batch_size * length / step_ms
        return Measurement(
            self.digest, e, k, batch_size, round(speed, 3), round(step_ms, 4), round(length, 4),
            10, 9, 20, f"{speed:.2f}", "a b c", 1.0, *draft,
        )  # fmt: skip

    def measure(self, batch_sizes):
        def measure_cells(cells):
            for cell in cells:
                self.asked.append(cell)
                yield from (self.measurement(cell, batch_size) for batch_size in batch_sizes)

        return measure_cells


def run(tmp_path, machine, grid, num_measured):
    """Of the target's own layers, or of several drafts' grids."""
    grids = grid if isinstance(grid, dict) else {OWN: grid}
    (batch_sizes,) = {grid.batch_sizes for grid in grids.values()}
    measured = MeasuredCells(tmp_path / "cells.csv", machine.digest, batch_sizes)
    agreements = {draft: machine.agreements.get(draft, machine.agreement) for draft in grids}
    return tune(grids, agreements, measured, machine.measure(batch_sizes), num_measured)


def own(cells):
    return [DraftCell(OWN, cell) for cell in cells]


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
    assert PLAIN_DECODING in machine.asked
    assert len(result.drafts[0].predictions) == 11 * 8 * 2
    again = Machine(make_agreement())
    assert run(tmp_path, again, grid, 4).choice == result.choice
    assert again.asked == []
    run(tmp_path, again, grid, ALL)
    assert sorted(again.asked) == sorted(set(own(grid.cells)) - set(machine.asked))
    assert len(load_measurements(tmp_path / "cells.csv")) == 2 * (11 * 8 + 1)


def test_predictions_are_near_what_is_measured(tmp_path):
    grid = Grid(tuple(range(1, NUM_LAYERS)), tuple(range(1, 9)), (1, 8))
    result = run(tmp_path, Machine(make_agreement()), grid, 6)
    (of_own,) = result.drafts
    for (e, k, batch_size), speedup in of_own.measured_speedups.items():
        assert of_own.prediction(e, k, batch_size).speedup == pytest.approx(speedup, rel=0.1)


def test_drafting_ends_where_batches_make_it_dear(tmp_path):
    grid = Grid(tuple(range(1, NUM_LAYERS)), tuple(range(1, 9)), (1, 8, 64))
    choice = run(tmp_path, Machine(make_agreement()), grid, 8).choice
    drafts = [entry[2] for entry in choice.schedule]
    assert drafts[0] > 0
    assert drafts[-1] == 0
    assert drafts == sorted(drafts, reverse=True)


# ---- drafts ----

KS = tuple(range(1, 9))
GRIDS = {
    OWN: Grid(tuple(range(1, NUM_LAYERS)), KS, (1,)),
    INT4: Grid(tuple(range(1, NUM_LAYERS + 1)), KS, (1,)),
    INT8: Grid((NUM_LAYERS,), KS, (1,)),
}


def stock_model():
    """Exits that accept next to nothing before the last layer, as without training for them."""
    generator = np.random.default_rng(0)
    agreements = {}
    for draft, last in ((OWN, 1.0), (INT4, 0.9), (INT8, 0.97)):
        exit_layers = GRIDS[draft].exit_layers
        rates = np.array([last if e == NUM_LAYERS else 0.05 for e in exit_layers])
        matches = [generator.random((1, 96)) < rates[:, None] for _ in range(24)]
        agreements[draft] = Agreement(exit_layers, tuple(matches), 1.0)
    return agreements


def chosen_of(tmp_path, machine, grids=GRIDS):
    choice = run(tmp_path, machine, grids, 4).choice
    return choice.draft, choice.exit_layer, choice.pays


def test_a_stock_model_drafts_with_all_its_layers_in_the_kind_that_is_cheapest(tmp_path):
    agreements = stock_model()
    machine = Machine(agreements[OWN], agreements=agreements)
    assert chosen_of(tmp_path, machine) == (INT4, NUM_LAYERS, True)
    assert {cell.draft for cell in machine.asked} == {OWN, INT4, INT8}
    assert len(machine.asked) == len(set(machine.asked)) == 1 + 5 + 5 + 3 + 4


def test_the_kind_follows_what_it_costs(tmp_path):
    agreements = stock_model()
    costs = LAYER_COSTS | {"int4": 1.1, "int8": 0.5}
    machine = Machine(agreements[OWN], agreements=agreements, layer_costs=costs)
    assert chosen_of(tmp_path, machine) == (INT8, NUM_LAYERS, True)


def test_the_kind_follows_what_it_accepts(tmp_path):
    agreements = stock_model()
    agreements[INT4] = make_agreement(GRIDS[INT4].exit_layers)
    agreements[INT4] = replace(
        agreements[INT4], matches=tuple(rows & False for rows in agreements[INT4].matches)
    )
    machine = Machine(agreements[OWN], agreements=agreements)
    assert chosen_of(tmp_path, machine) == (INT8, NUM_LAYERS, True)


def test_kinds_that_cost_as_much_as_the_target_do_not_pay(tmp_path):
    """The negative control: acceptance alone makes no choice."""
    agreements = stock_model()
    costs = dict.fromkeys(LAYER_COSTS, 2.0)
    machine = Machine(agreements[OWN], agreements=agreements, layer_costs=costs)
    assert chosen_of(tmp_path, machine)[2] is False
    trained = {draft: make_agreement(grid.exit_layers) for draft, grid in GRIDS.items()}
    dear = Machine(trained[OWN], agreements=trained, layer_costs=costs | {"none": 1.0})
    draft, exit_layer, pays = chosen_of(tmp_path / "trained", dear)
    assert (draft, pays) == (OWN, True)
    assert exit_layer < NUM_LAYERS


def test_each_draft_is_predicted_by_its_own_acceptance_and_costs(tmp_path):
    agreements = {draft: make_agreement(grid.exit_layers) for draft, grid in GRIDS.items()}
    machine = Machine(agreements[OWN], agreements=agreements)
    for of in run(tmp_path, machine, GRIDS, 4).drafts:
        assert len(of.measured_speedups) >= 3
        for (e, k, batch_size), speedup in of.measured_speedups.items():
            assert of.prediction(e, k, batch_size).speedup == pytest.approx(speedup, rel=0.1)


def test_another_kind_later_measures_only_its_own_cells(tmp_path):
    agreements = stock_model()
    first = Machine(agreements[OWN], agreements=agreements)
    chosen_of(tmp_path, first, {OWN: GRIDS[OWN]})
    then = Machine(agreements[OWN], agreements=agreements)
    chosen_of(tmp_path, then, {OWN: GRIDS[OWN], INT8: GRIDS[INT8]})
    assert PLAIN_DECODING not in then.asked
    assert not set(first.asked) & set(then.asked)
    assert INT8 in {cell.draft for cell in then.asked}


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
            for draft, exit_layers in job["exits"]:
                agreement = make_agreement(exit_layers)
                file = Path(request["folder"], agreement_name(Draft(*draft)))
                agreement.save(file, job["settings_digest"])
                yield {"num_tokens": agreement.num_tokens}
            return
        machine = Machine(make_agreement(range(1, 13)), digest=job["settings_digest"])
        for draft, cell in job["cells"]:
            for batch_size in job["workload"]["batch_sizes"]:
                measured = DraftCell(Draft(*draft), tuple(cell))
                measurement = machine.measurement(measured, batch_size)
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


def test_a_twin_is_chosen_written_and_served(checkpoint, prompts, tmp_path, fake_processes, capsys):
    """No block is needed; and a choice without a twin takes an earlier one out of the block."""
    config = json.loads((checkpoint / "config.json").read_text())
    del config["layerskip"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    more = ("--exit-layers", "all", "--num-speculative-tokens", "2-4", "--num-measured", "all")
    kinds = ("--draft-quantization", "int4", "int8", "fp8")
    assert command(checkpoint, prompts, tmp_path, *more, *kinds) == 0
    block = json.loads((checkpoint / "config.json").read_text())["layerskip"]
    options = resolve_options({"model": "[self]"}, NUM_LAYERS, block)
    assert (options.exit_layer, options.draft_quantization) == (NUM_LAYERS, "int4")
    shown = capsys.readouterr()
    assert "drafts with int4, E = 12" in shown.out
    assert "int8 E=12 K=2, batch 1" in shown.err
    assert "Warning: in float32 a draft of fewer bits is a reference" in shown.err
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    assert [twin["quantization"] for twin in report["twins"]] == ["int4", "int8", "fp8"]
    assert "costs" not in report
    assert report["choice"]["draft_quantization"] == "int4"
    assert {row["draft_quantization"] for row in report["predictions"]} == set(kinds[1:])
    assert (tmp_path / "results" / "agreement-int4.npz").exists()
    assert [asked["kind"] for asked in fake_processes].count("agreement") == 1

    before = len(fake_processes)
    more = ("--exit-layers", "3-6", "--num-measured", 0)
    assert command(checkpoint, prompts, tmp_path, "--dry-run", *more) == 0
    assert '"draft_quantization": "none"' in capsys.readouterr().out.splitlines()[-1]
    assert command(checkpoint, prompts, tmp_path, *more) == 0
    assert len(fake_processes) > before
    block = json.loads((checkpoint / "config.json").read_text())["layerskip"]
    assert "draft_quantization" not in block


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_the_block_names_an_adapter_only_inside_the_checkpoint(
    checkpoint, prompts, tmp_path, fake_processes, capsys, place
):
    folder = (checkpoint if place == "inside" else tmp_path) / "adapters" / "e3"
    write_adapter(folder, exit_layer=3)
    more = ("--draft-adapter", folder, "--draft-quantization", "int4", "--num-measured", 0)
    assert command(checkpoint, prompts, tmp_path, *more) == 0
    block = json.loads((checkpoint / "config.json").read_text())["layerskip"]
    assert (block["exit_layer"], block["draft_quantization"]) == (3, "int4")
    line = capsys.readouterr().out.splitlines()[-1]
    if place == "inside":
        assert block["draft_adapter"] == "adapters/e3"
        assert "--draft-adapter" not in line
    else:
        assert "draft_adapter" not in block
        assert line.endswith(f"--draft-adapter {folder}")
    cells = [asked["job"] for asked in fake_processes if asked["kind"] == "cells"]
    adapters = {draft[1] for job in cells for draft, (e, _) in job["cells"] if e}
    assert adapters == set(cells[0]["engine"]["draft_adapters"])

    # A moved folder is the same adapter: nothing is measured again.
    jobs = len(fake_processes)
    moved = folder.rename(folder.with_name("moved"))
    assert command(checkpoint, prompts, tmp_path, "--draft-adapter", moved, *more[2:]) == 0
    assert len(fake_processes) == jobs


def write_adapter(folder, exit_layer=None):
    """A draft adapter of the checkpoint's first layer."""
    config = json.loads((MODEL / "config.json").read_text())
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    shapes = {"A": (2, config["hidden_size"]), "B": (config["intermediate_size"], 2)}
    folder.mkdir(parents=True)
    save_file(
        {name.format(part): torch.full(shape, 0.01) for part, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    if exit_layer is not None:
        record = {"base_model": "m", "base_digest": None, "exit_layer": exit_layer}
        (folder / "layerskip_adapter.json").write_text(json.dumps(record))


def test_an_adapter_drafts_from_the_layers_that_it_was_trained_for(
    checkpoint, prompts, tmp_path, fake_processes, capsys
):
    write_adapter(tmp_path / "e3", exit_layer=3)
    more = ("--draft-adapter", "none", tmp_path / "e3", "--num-measured", 0)
    assert command(checkpoint, prompts, tmp_path, *more, "--exit-layers", "2,3,5") == 0
    cells = {
        (draft[1] != "none", cell[0])
        for asked in fake_processes if asked["kind"] == "cells"
        for draft, cell in asked["job"]["cells"] if cell[0]
    }  # fmt: skip
    assert cells == {(False, 2), (False, 3), (False, 5), (True, 3)}
    assert command(checkpoint, prompts, tmp_path, *more, "--exit-layers", "4-6") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"--draft-adapter {tmp_path / 'e3'}" in message
    assert "may be 3, and --exit-layers 4-6 has none" in message
    write_adapter(tmp_path / "e12", exit_layer=NUM_LAYERS)
    assert command(checkpoint, prompts, tmp_path, "--draft-adapter", tmp_path / "e12") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "exits after 12 of 12 layers, which needs rounded weights" in message


def test_a_roofline_knows_kinds(checkpoint, prompts, tmp_path, fake_processes, capsys):
    more = ("--hardware", "h100", "--dry-run", "--draft-quantization", "none", "int4")
    assert command(checkpoint, prompts, tmp_path, *more, "--dtype", "bfloat16") == 0
    shown = capsys.readouterr()
    assert "drafts with int4" in shown.out
    assert '"draft_quantization": "int4"' in shown.out
    assert "float32" not in shown.err
    assert [asked["kind"] for asked in fake_processes] == ["agreement"]


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
    monkeypatch.setattr(Machine, "step_ms", lambda self, e, k, *_: 20.0 + e * k)
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
        (("--exit-layers", "all"), ("--exit-layers all", "--draft-quantization int4")),
        (("--exit-layers", "2-all", "--draft-quantization", "int4"), ("from 1 to 12", "'all'")),
        (
            ("--exit-layers", "all", "--draft-quantization", "none", "int4"),
            ("--draft-quantization none", "may be 1 to 11", "--exit-layers all"),
        ),
        (("--draft-quantization", "int2"), ("'int2'", "int4")),
        (("--draft-adapter", "no-such"), ("--draft-adapter no-such", "no folder")),
        (
            ("--draft-quantization", "none", "int4", "--agreement", "no.npz"),
            ("--agreement no.npz", "one draft", "none, int4"),
        ),
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


TWIN = {"draft_quantization": "int4", "draft_adapter": "none"}


class TestCheckAgainstASweep:
    """benchmarks/pages/check_tuning.py: a good choice passes, a bad one fails."""

    @pytest.fixture
    def check(self, tmp_path):
        def check(pair, speeds, schedule=None, pays=True, twin=None):
            choice, sweep = tmp_path / "choice", tmp_path / "sweep"
            for folder in (choice, sweep):
                folder.mkdir()
            grid = {"exit_layers": [2, 3], "num_speculative_tokens": [1, 2], "batch_sizes": [1]}
            report = {
                "grid": grid,
                "predictions": [
                    {"exit_layer": e, "num_speculative_tokens": k, **(draft or {})}
                    for draft in (None, *([TWIN] if twin else []))
                    for e in grid["exit_layers"]
                    for k in grid["num_speculative_tokens"]
                ],
                "choice": {
                    **({} if twin is None else TWIN),
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
            measured += [
                replace(one, exit_layer=e, num_speculative_tokens=k, tokens_per_s=speed, **TWIN)
                for (e, k), speed in (twin or {}).items()
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
        assert "The sweep lacks E=3 K=2 at batch size 1" in process.stderr

    TWIN_SPEEDS = {(2, 1): 160.0, (2, 2): 150.0, (3, 1): 140.0, (3, 2): 120.0}

    @pytest.mark.parametrize(("pair", "status"), [((2, 1), 0), ((2, 2), 0), ((3, 2), 1)])
    def test_a_twins_choice_is_compared_with_every_drafts_cells(self, check, pair, status):
        process = check(pair, self.SPEEDS, twin=self.TWIN_SPEEDS)
        assert process.returncode == status, process.stderr
        assert "chosen int4 E={} K={}, ".format(*pair) in process.stdout
        assert "best of the sweep int4 E=2 K=1, 160.0 tokens/s (1.600 x plain)" in process.stdout

    def test_a_twin_that_the_sweep_lacks(self, check):
        speeds = {cell: speed for cell, speed in self.TWIN_SPEEDS.items() if cell != (3, 1)}
        process = check((2, 1), self.SPEEDS, twin=speeds)
        assert process.returncode == 2
        assert "The sweep lacks int4 E=3 K=1 at batch size 1" in process.stderr
