# SPDX-License-Identifier: Apache-2.0
"""Modes that take turns, with a stand-in for benchmarks.decode.measure."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.decode import compare, running
from benchmarks.decode.interleaved import run_interleaved
from benchmarks.decode.processes import ModeProcess
from benchmarks.engines.results import Record, add_record, load_records
from vllm_layerskip.errors import UserError

from .records import tiny_settings

ROOT = Path(__file__).parents[3]
SETTINGS = tiny_settings()
"""Cells of batch 1 and 2."""

MEASURE = """
import sys, time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.decode.measure import Job
from tests.unit.benchmarks.records import tiny_settings

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

mode, output = option("--mode"), Path(option("--output"))
job = Job(mode, tiny_settings(), output, {"number_of_process": option("--turns")})

def start():
    pass

def before(cell, number):
    pass

{changes}

start()
with Connection(int(option("--turns"))) as table:
    for cell in job.cells_of_turns(table):
        before(cell, job.settings.round)
        job.emit({**cell._asdict(), "status": "ok", "tokens_per_s": 1.0, "step_ms": 1.0})
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    output = tmp_path / "results.json"

    def run(changes: str = "", rounds: int = 2, time_limit: float | None = None) -> list[Record]:
        script = tmp_path / "measure.py"
        script.write_text(MEASURE.replace("{changes}", changes))
        monkeypatch.setattr(running, "MEASURE", (str(script),))
        monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        table = [ModeProcess(mode, SETTINGS) for mode in ("plain", "layerskip")]
        deadline = None if time_limit is None else time.monotonic() + time_limit
        run_interleaved(table, rounds, output, tmp_path, running.RunOptions(deadline))
        return load_records(output)

    return run


def outcomes(records: list[Record]) -> list[tuple]:
    return [
        (record.get("batch_size"), record["settings"]["round"], record["mode"], record["status"])
        for record in records
    ]


def test_modes_take_turns_cell_by_cell(run, capsys):
    records = run()
    assert outcomes(records) == [
        (size, number, mode, "ok")
        for size in (1, 2)
        for number in (1, 2)
        for mode in ("plain", "layerskip")
    ]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert printed[0].startswith("plain-k4: prompt 16, batch 1: 1.0 tokens/s")
    assert printed[-1].startswith("layerskip-e2-k4-round2: prompt 16, batch 2")


def test_only_one_process_measures_at_a_time(run, tmp_path):
    """And both had started before the first turn."""
    log = tmp_path / "events"
    changes = f"""
def write(*words):
    with open({str(log)!r}, "a") as stream:
        print(mode, *words, file=stream)

def start():
    write("started")

def before(cell, number):
    write("begins")
    time.sleep(0.2)
    write("ends")
"""
    run(changes, rounds=1)
    events = log.read_text().splitlines()
    assert events[:2] == ["plain started", "layerskip started"]
    pairs = list(zip(events[2::2], events[3::2], strict=True))
    assert pairs == [(f"{mode} begins", f"{mode} ends") for mode in ("plain", "layerskip")] * 2


def test_a_mode_that_does_not_start_costs_the_others_nothing(run, capsys):
    records = run('def start():\n    assert mode == "plain", "no room"')
    assert outcomes(records)[0] == (None, 1, "layerskip", "error")
    assert "AssertionError: no room" in records[0]["reason"]
    assert outcomes(records)[1:] == [
        (size, number, "plain", "ok") for size in (1, 2) for number in (1, 2)
    ]
    assert "layerskip-e2-k4: exit status 1: AssertionError: no room" in capsys.readouterr().out


def test_a_mode_that_ends_in_its_turn_keeps_what_it_measured(run):
    records = run(
        "def before(cell, number):\n"
        '    if (mode, number) == ("layerskip", 2): raise SystemExit("killed")'
    )
    of_layerskip = [outcome for outcome in outcomes(records) if outcome[2] == "layerskip"]
    assert of_layerskip == [(1, 1, "layerskip", "ok"), (None, 2, "layerskip", "error")]
    assert [outcome for outcome in outcomes(records) if outcome[2] == "plain"] == [
        (size, number, "plain", "ok") for size in (1, 2) for number in (1, 2)
    ]


def test_the_time_limit_ends_a_turn(run):
    start = time.monotonic()
    records = run("def before(cell, number):\n    time.sleep(60 * cell.batch_size - 60)",
                  time_limit=15)  # fmt: skip
    assert time.monotonic() - start < 50
    done = [outcome for outcome in outcomes(records) if outcome[3] == "ok"]
    assert [outcome[0] for outcome in done] == [1] * len(done)
    missing = [outcome for outcome in outcomes(records) if outcome[3] == "no-time"]
    assert {outcome[2] for outcome in missing} <= {"plain", "layerskip"}
    assert missing


def test_a_table_goes_on_where_it_ended(run, tmp_path):
    first = run(rounds=1)
    before = replace(SETTINGS, round=2).identity()
    add_record(tmp_path / "results.json", first[0] | {"settings": before, "tokens_per_s": 9.0})
    records = run(rounds=2)
    assert len(records) == 8
    assert records[:4] == first
    assert records[4]["tokens_per_s"] == 9.0, "a cell was measured again"


def test_options_that_exclude_each_other(capsys):
    parser = compare.build_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--tiny", "--rounds", "2", "--interleave", "2"])
    assert "not allowed with argument" in capsys.readouterr().err
    argv = ["--model", "x", "--interleave", "2", "--modes", "transformers"]
    argv += ["--exit-layer", "1", "--num-speculative-tokens", "1"]
    with pytest.raises(UserError, match="--interleave is for vLLM's engines"):
        compare.table_from(parser.parse_args(argv))
