# SPDX-License-Identifier: Apache-2.0
"""Modes that take turns, with a stand-in for benchmarks.decode.measure."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks.decode import compare, running
from benchmarks.decode.interleaved import run_interleaved
from benchmarks.decode.processes import ModeProcess
from benchmarks.engines.results import Record, add_record, load_records
from vllm_layerskip.errors import UserError

from .records import parse_settings, tiny_settings

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

    def run(changes: str = "", rounds: int = 2) -> list[Record]:
        script = tmp_path / "measure.py"
        script.write_text(MEASURE.replace("{changes}", changes))
        monkeypatch.setattr(running, "MEASURE", (str(script),))
        monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        table = [ModeProcess(mode, SETTINGS) for mode in ("plain", "layerskip")]
        run_interleaved(table, rounds, output, tmp_path, running.RunOptions())
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
    assert outcomes(records)[:2] == [(None, number, "layerskip", "error") for number in (1, 2)]
    assert "AssertionError: no room" in records[0]["reason"]
    assert outcomes(records)[2:] == [
        (size, number, "plain", "ok") for size in (1, 2) for number in (1, 2)
    ]
    assert "layerskip-e2-k4: exit status 1: AssertionError: no room" in capsys.readouterr().out


def test_a_mode_that_ends_in_its_turn_keeps_what_it_measured(run):
    records = run(
        "def before(cell, number):\n"
        '    if (mode, number) == ("layerskip", 2): raise SystemExit("killed")'
    )
    of_layerskip = [outcome for outcome in outcomes(records) if outcome[2] == "layerskip"]
    assert of_layerskip == [
        (1, 1, "layerskip", "ok"), (None, 1, "layerskip", "error"), (None, 2, "layerskip", "error")
    ]  # fmt: skip
    assert {record.get("reason") for record in records} == {None, "exit status 1: killed"}
    assert [outcome for outcome in outcomes(records) if outcome[2] == "plain"] == [
        (size, number, "plain", "ok") for size in (1, 2) for number in (1, 2)
    ]


def test_what_a_dead_mode_started_ends_with_it(run, tmp_path):
    """Not when the table ends: an engine process that lives on would disturb the other modes."""
    pid = tmp_path / "pid"
    child = "import time; time.sleep(60)"
    changes = f"""
def before(cell, number):
    import os, signal, subprocess
    if mode == "layerskip":
        engine = subprocess.Popen([sys.executable, "-c", {child!r}])
        Path({str(pid)!r}).write_text(str(engine.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    elif Path({str(pid)!r}).exists():
        state = Path("/proc", Path({str(pid)!r}).read_text(), "stat")
        assert not state.exists() or state.read_text().split()[2] == "Z", "the engine lives on"
"""
    records = run(changes)
    assert pid.exists()
    assert outcomes(records) == [
        (1, 1, "plain", "ok"),
        (None, 1, "layerskip", "error"),
        (None, 2, "layerskip", "error"),
        *((size, number, "plain", "ok") for size, number in ((1, 2), (2, 1), (2, 2))),
    ]


@pytest.mark.parametrize("slow", ["start", "turn"])
def test_the_time_limit_ends_a_start_and_a_turn(run, tmp_path, monkeypatch, slow):
    """The limit comes when the slow part has begun, however long the starts took."""
    begun = tmp_path / "begun"
    wait = f"Path({str(begun)!r}).touch(); time.sleep(60)"
    changes = {
        "start": f"def start():\n    {wait}",
        "turn": f"def before(cell, number):\n    if cell.batch_size == 2: {wait}",
    }[slow]
    monkeypatch.setattr(
        running.RunOptions, "time_left", property(lambda options: -1.0 if begun.exists() else 9.0)
    )
    records = run(changes)
    done = [] if slow == "start" else [
        (1, number, mode, "ok") for number in (1, 2) for mode in ("plain", "layerskip")
    ]  # fmt: skip
    assert outcomes(records) == done + [
        (None, number, mode, "no-time") for mode in ("plain", "layerskip") for number in (1, 2)
    ]


def test_processes_end_by_themselves(run, tmp_path):
    """An engine that a signal ends leaves its folder behind."""
    changes = f"""
import atexit
atexit.register(lambda: Path({str(tmp_path)!r}, mode + ".ended").touch())
"""
    run(changes, rounds=1)
    assert {path.name for path in tmp_path.glob("*.ended")} == {"plain.ended", "layerskip.ended"}


TABLE = ("--preset", "7b-cnndm", "--interleave", "2", "--modes", "plain", "layerskip")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model", "x", "--interleave", "2", "--modes", "plain", "transformers"],
            "--interleave=2 cannot go with --modes transformers: ",
        ),
        (["--resume", *TABLE, "--device", "cpu"], "--interleave=2 cannot go with --resume"),
        (TABLE, "--interleave keeps 2 engines alive, and each asks for its default"),
        (
            [*TABLE, "--engine-args", '{"gpu_memory_utilization": 0.6}'],
            """such as --engine-args '{"gpu_memory_utilization": 0.45}'""",
        ),
        (
            [*TABLE, "--engine-args", '{"gpu_memory_utilization": "0.2"}'],
            "each asks for gpu_memory_utilization='0.2'",
        ),
        (["--tiny", "--drafts", "2:4", "2:4"], "--drafts names 2:4 twice"),
        (["--tiny", "--modes", "plain", "plain"], "--modes names plain twice"),
    ],
)
def test_what_cannot_be(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compare.table_from(compare.build_parser().parse_args([*argv]))


def test_shares_of_a_gpu_that_fit():
    argv = [*TABLE, "--engine-args", '{"gpu_memory_utilization": 0.5}']
    assert len(compare.table_from(compare.build_parser().parse_args(argv))) == 2


def test_one_engine_may_have_the_whole_gpu():
    argv = ["--preset", "7b-cnndm", "--interleave", "2", "--modes", "plain"]
    assert len(compare.table_from(compare.build_parser().parse_args(argv))) == 1


def test_a_cell_that_is_named_twice_is_one():
    settings = parse_settings("--tiny", "--batch-sizes", "2", "1", "2", "--prompt-lens", "9", "9")
    assert settings.cells() == [(9, 1), (9, 2)]


def test_turns_are_not_resumed_in_rounds(run, tmp_path):
    for record in run(rounds=1):
        add_record(tmp_path / "turns.json", record | {"interleaved": True, "mode": "early-exit"})
    argv = ["--tiny", "--resume", "--rounds", "2", "--output", str(tmp_path / "turns.json")]
    with pytest.raises(UserError, match="--resume cannot go on with .*: its engines took turns"):
        compare.table_from(compare.build_parser().parse_args(argv))


def test_rounds_or_turns(capsys):
    with pytest.raises(SystemExit):
        compare.build_parser().parse_args(["--tiny", "--rounds", "2", "--interleave", "2"])
    assert "not allowed with argument" in capsys.readouterr().err
