# SPDX-License-Identifier: Apache-2.0
"""The session of a GPU lease: a part that fails, hangs or is cut off costs the others nothing.

Sessions run in processes of their own, since a session ends every descendant that it has.
tests/engine/commands/test_benchmarks.py rehearses the real parts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from vllm.engine.arg_utils import EngineArgs

from benchmarks.decode.compare import build_parser, table_from
from benchmarks.engines.arguments import engine_arguments
from benchmarks.gpu import gpu_session, steps
from benchmarks.gpu.session import LOGS
from vllm_layerskip.measuring.hardware import gpu_info
from vllm_layerskip.plugin import register

ROOT = Path(__file__).parents[3]
SESSION = ROOT / "benchmarks" / "gpu_session.sh"

PARTS = """
import sys
from pathlib import Path
from benchmarks.gpu import session
from benchmarks.gpu.session import Part, Session
session.PATIENCE_S = 1.0
session.POLL_S = 0.1
session.MARGIN_S = 0.0

def python(name, limit_s, code):
    return Part(name, limit_s, (sys.executable, "-c", code, "{{seconds}}"))

results, delivery = Path(sys.argv[1]), Path(sys.argv[2])
parts = [{parts}]
outcomes = Session(results, delivery, lambda results: "the summary").run(parts)
sys.exit(any(outcome.status != "ok" for outcome in outcomes))
"""


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "results", tmp_path / "out"


@pytest.fixture
def start(folders, tmp_path):
    """Starts a session of parts that are given as Python source."""

    def start(*parts: str) -> subprocess.Popen[str]:
        script = tmp_path / "parts.py"
        script.write_text(PARTS.format(parts=", ".join(parts)))
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, folders)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    return start


def statuses(folder: Path) -> dict[str, str]:
    outcomes = json.loads((folder / "session.json").read_text())["outcomes"]
    return {outcome["name"]: outcome["status"] for outcome in outcomes}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def is_running(pid_file: Path) -> bool:
    try:
        return psutil.Process(int(pid_file.read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def engine_like(results: Path, then: str) -> str:
    """Code of a part whose child has a session of its own and ignores SIGTERM, as an engine may."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    return (
        "import json, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        f"open({str(results / 'child.pid')!r}, 'w').write(str(child.pid))\n"
        f"open({str(results / 'part.json')!r}, 'w').write(json.dumps('a first cell'))\n"
        f"{then}\n"
    )


def test_a_part_that_fails_stops_no_other(start, folders):
    process = start(
        "python('bad', 20, 'print(\"before the end\"); sys.exit(3)')",
        "python('good', 20, 'print(\"INFO 11-26 noise\"); print(\"a result\")')",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert statuses(folders[1]) == {"bad": "failed: exit status 1", "good": "ok"}
    assert "name 'sys' is not defined" in output, "the end of a failed part's log is shown"
    assert "a result" in output
    assert "noise" not in output
    with tarfile.open(folders[1] / "logs.tar.gz") as archive:
        assert set(archive.getnames()) == {"logs/bad.log", "logs/good.log"}
    assert (folders[1] / "summary.md").read_text() == "the summary"


def test_two_parts_that_lack_one_module_end_the_session(start, folders):
    lacking = """raise ModuleNotFoundError("No module named 'flashinfer'")"""
    other = """raise ModuleNotFoundError("No module named 'numba'")"""
    process = start(
        f"python('one', 9, {lacking!r})",
        f"python('two', 9, {other!r})",
        "python('three', 9, 'print(3)')",
        f"python('four', 9, {lacking!r})",
        "python('five', 9, 'print(5)')",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "5" not in output.split()
    assert list(statuses(folders[0]).values()) == [
        *["failed: exit status 1"] * 2, "ok", "failed: exit status 1",
        "not begun: two parts ended with ModuleNotFoundError: No module named 'flashinfer'",
    ]  # fmt: skip


def test_a_part_that_hangs_is_killed_with_all_that_it_started(start, folders):
    hangs = engine_like(
        folders[0], "import signal; signal.signal(15, signal.SIG_IGN)\ntime.sleep(60)"
    )
    begin = time.monotonic()
    process = start(f"python('hangs', 6, {hangs!r})", "python('next', 20, 'print(1)')")
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert statuses(folders[1]) == {"hangs": "stopped: its limit of 6 s", "next": "ok"}
    assert not is_running(folders[0] / "child.pid")
    assert json.loads((folders[1] / "part.json").read_text()) == "a first cell"


def test_unused_time_goes_to_later_parts_and_no_part_takes_from_them(start, folders):
    process = start(
        "python('quick', 10, 'pass')",
        "python('slow', 5, 'import sys, time; print(sys.argv[1]); time.sleep(7)')",
        "python('last', 5, 'import sys; print(sys.argv[1])')",
    )
    process.communicate(timeout=60)
    assert set(statuses(folders[1]).values()) == {"ok"}, "7 s of 5 and what was left of 10"
    limits = [int((folders[0] / "logs" / f"{name}.log").read_text()) for name in ("slow", "last")]
    assert 12 <= limits[0] <= 15
    assert limits[1] >= 5


def test_a_summary_that_fails_costs_no_part(start, folders, tmp_path):
    process = start("python('one', 20, 'pass')", "python('two', 20, 'pass')")
    process.communicate(timeout=60)
    script = (tmp_path / "parts.py").read_text()
    (tmp_path / "parts.py").write_text(script.replace('"the summary"', "1 / 0"))
    command = [sys.executable, str(tmp_path / "parts.py"), *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, timeout=60, env=environment)
    assert statuses(folders[1]) == {"one": "ok", "two": "ok"}
    assert "ZeroDivisionError" in (folders[1] / "summary.md").read_text()


def test_results_of_other_code_are_set_aside(start, folders):
    """``--resume`` would go on with them, and the summary would show them as this code's."""
    results, _ = folders
    write = "open({!r}, 'w').write('1')".format(str(results / "table.json"))
    start(f"python('one', 20, {write!r})").communicate(timeout=60)
    start("python('two', 20, 'pass')").communicate(timeout=60)
    assert (results / "table.json").exists(), "the same code goes on"
    state = json.loads((results / "session.json").read_text())
    state["provenance"]["code"] = "other"
    (results / "session.json").write_text(json.dumps(state))
    start("python('three', 20, 'pass')").communicate(timeout=60)
    assert not (results / "table.json").exists()
    assert (results / "older" / "other" / "table.json").exists()
    assert statuses(results) == {"three": "ok"}


def test_a_delivery_that_fails_costs_no_part(start, folders):
    results, out = folders
    out.write_text("no folder")
    output, _ = start("python('one', 20, 'pass')", "python('two', 20, 'print(2)')").communicate(
        timeout=60
    )
    assert statuses(results) == {"one": "ok", "two": "ok"}
    assert "== two: ok" in output


def test_a_second_session_does_not_disturb_the_first(start, folders):
    results, _ = folders
    first = start(f"python('long', 60, {engine_like(results, 'time.sleep(60)')!r})")
    wait_for(results / "child.pid")
    command = ["bash", str(SESSION), "--tiny", "bf16"]
    environment = os.environ | {"PYTHON": sys.executable, "RESULTS": str(results)}
    second = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert second.returncode == 2
    assert "is in use by another session" in second.stderr
    assert is_running(results / "child.pid")
    first.terminate()
    first.communicate(timeout=30)


def test_a_table_that_ran_out_of_time_is_incomplete_and_not_ok(start, folders):
    process = start("python('table', 20, 'import sys; sys.exit(3)')")
    process.communicate(timeout=60)
    assert statuses(folders[1]) == {"table": "incomplete: its own time limit"}


def test_no_more_files_are_delivered_than_come_back(start, folders):
    results, out = folders
    # It goes on for some polls: results are delivered before the session's state is written.
    write = f"import time\nfor i in range(9): open(f'{results}/' + f'{{i}}.json', 'w').write('1')"
    write += "\ntime.sleep(1)"
    start(f"python('many', 20, {write!r})").communicate(timeout=60)
    names = {path.name for path in out.iterdir()}
    assert len(names) <= 8
    assert {"session.json", "summary.md", "logs.tar.gz"} <= names
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert {f"{i}.json" for i in range(9)} <= set(archive.getnames())


def test_an_archive_comes_back_whole(start, folders):
    results, out = folders
    code = f"open({str(results / 'adapter.tar.gz')!r}, 'w').write('an archive')"
    start(f"python('pack', 20, {code!r})").communicate(timeout=60)
    assert (out / "adapter.tar.gz").read_text() == "an archive"
    state = json.loads((results / "session.json").read_text())
    state["provenance"]["code"] = "other"
    (results / "session.json").write_text(json.dumps(state))
    start("python('next', 20, 'pass')").communicate(timeout=60)
    assert not (results / "adapter.tar.gz").exists(), "of other code, as result files"


def test_a_part_without_time_is_not_begun(start, folders):
    process = start("python('none', 1, 'print(1)')", "python('next', 20, 'print(2)')")
    process.communicate(timeout=60)
    assert statuses(folders[1]) == {"none": "not begun: no time was left", "next": "ok"}


def test_a_session_that_is_asked_to_end_delivers_what_it_has(start, folders):
    code = engine_like(folders[0], "time.sleep(60)")
    process = start("python('first', 20, 'pass')", f"python('long', 60, {code!r})")
    wait_for(folders[1] / "part.json")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert statuses(folders[1]) == {"first": "ok", "long": "cut off: the session was ended"}
    assert (folders[1] / "logs.tar.gz").exists()
    assert not is_running(folders[0] / "child.pid")


def test_a_session_that_is_killed_has_delivered_what_was_measured(start, folders):
    code = engine_like(folders[0], "time.sleep(60)")
    process = start("python('first', 20, 'pass')", f"python('long', 60, {code!r})")
    wait_for(folders[1] / "part.json")
    time.sleep(0.5)
    process.kill()
    process.communicate(timeout=30)
    assert statuses(folders[1]) == {"first": "ok"}
    assert json.loads((folders[1] / "part.json").read_text()) == "a first cell"
    # What it left running holds the GPU until the next session begins.
    assert is_running(folders[0] / "child.pid")
    start("python('again', 20, 'pass')").communicate(timeout=30)
    assert not is_running(folders[0] / "child.pid")


class Parsed(Exception):
    """Raised instead of running a program with its arguments."""


def parsed(path: Path, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """Arguments as a program's own parser takes them."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace))

    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(Parsed) as raised:
            module.main()
    return raised.value.args[0]


class TestSteps:
    @pytest.fixture(params=[False, True], ids=["gpu", "tiny"])
    def make(self, request, tmp_path):
        return steps.PartMaker(tmp_path, request.param, "question.jsonl", carried=tmp_path)

    @pytest.mark.parametrize("name", steps.STEPS)
    def test_a_step_fits_into_its_command(self, name, tmp_path):
        make = steps.PartMaker(tmp_path, False, "question.jsonl", carried=tmp_path)
        longer = {"first": steps.FIRST_LIMIT_S, "real-model": steps.REAL_MODEL_LIMIT_S}
        limit_s = longer.get(name, steps.STEP_LIMIT_S)
        assert limit_s < 570, "a command has ten minutes, and it unpacks first"
        parts = steps.STEPS[name](make)
        assert sum(part.limit_s for part in parts) <= limit_s
        assert len({part.name for part in parts}) == len(parts), "logs would be overwritten"

    @pytest.mark.parametrize("name", steps.STEPS)
    def test_every_command_is_one_that_its_program_takes(self, make, name, monkeypatch):
        """A typo would cost a part of a lease. A table's settings become engines' arguments."""
        for part in steps.STEPS[name](make):
            python, *arguments = part.command
            assert python == sys.executable
            path = arguments.pop(0)
            if path == "-m":
                path = arguments.pop(0).replace(".", "/") + ".py"
            arguments = [argument.replace("{seconds}", "60") for argument in arguments]
            args = parsed(ROOT / path, arguments, monkeypatch)
            if Path(path).name == "train_model.py":
                # Without the packages there is too little text for 160 M parameters.
                assert bool(args.packages) != make.tiny
            if Path(path).name != "compare.py" or args.model:
                continue
            for one in table_from(args):
                folder = make.results / name / one.name
                engine = engine_arguments(one.settings, one.mode, folder, fixed_batches=True)
                register()
                config = EngineArgs(**engine).create_engine_config()
                assert (config.speculative_config is None) == (one.mode == "plain")

    def test_first_brings_what_matters_in_order(self, tmp_path):
        parts = steps.first(steps.PartMaker(tmp_path, False, None))
        assert [part.name for part in parts] == ["gpu", "exact", "demo", "7b", "7b-peers", "8b"]
        limits = {part.name: part.limit_s for part in parts}
        assert limits["exact"] >= 110, "a cold machine starts its first engine in it"
        demo = next(part for part in parts if part.name == "demo")
        log = Path(demo.command[demo.command.index("--log") + 1])
        assert log.parent == tmp_path / LOGS, "the engines' log comes back"
        assert "embedded" in demo.command, "the machine has no network to fetch a model"

    def test_twins_begin_with_the_most_telling(self, tmp_path):
        table, check = steps.twins(steps.PartMaker(tmp_path, False, None))
        arguments = list(table.command[3:])
        args = build_parser().parse_args(
            [argument.replace("{seconds}", "60") for argument in arguments]
        )
        names = [one.name for one in table_from(args)]
        assert names == [
            "plain-k12", "layerskip-e8-k12-int4", "layerskip-e32-k4-int4", "layerskip-e8-k12",
            "layerskip-e8-k12-fp8", "layerskip-e32-k4-fp8",
        ]  # fmt: skip
        assert args.batch_sizes == [1, 8, 32]
        assert "bfloat16" in check.command

    @pytest.mark.parametrize(
        ("arguments", "variables", "message"),
        [
            (["nonsense"], {}, "no step is called nonsense. Steps: first bf16 real-model"),
            (
                ["real-model"],
                {"SEES_A_GPU": "1", "TMPDIR": "."},
                "the model has not arrived. Carry",
            ),
            (["serve"], {"SEES_A_GPU": "1", "QUESTIONS": ""}, "set the variable QUESTIONS"),
            (["first"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
            (["first"], {}, "there is no NVIDIA GPU. Add --tiny"),
            (
                ["first"],
                {"SEES_A_GPU": "1", "BENCHMARK_COMMIT": "", "GIT_DIR": "/none"},
                "set BENCHMARK_COMMIT to its hash",
            ),
            ([], {}, "the following arguments are required: STEP"),
        ],
    )
    def test_a_users_mistake_is_one_line_and_exit_status_2(
        self, arguments, variables, message, tmp_path
    ):
        if gpu_info() and "no NVIDIA GPU" in message:
            pytest.skip("there is one")
        if variables.get("SEES_A_GPU"):
            (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200, 580, 1 MiB\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
            variables = variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        process = subprocess.run(
            ["bash", str(SESSION), *arguments],
            capture_output=True, text=True, check=False, timeout=60,
            env=environment | {"PYTHON": sys.executable} | variables,
        )  # fmt: skip
        assert process.returncode == 2
        assert message in process.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_vllm_samples_without_flashinfer_where_that_is_not_installed(
    installed, tmp_path, monkeypatch
):
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR",
                 "TRITON_CACHE_DIR", "VLLM_NO_USAGE_STATS", "TOKENIZERS_PARALLELISM"):  # fmt: skip
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    spec = object() if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    gpu_session.prepare_environment(tmp_path, tiny=False)
    assert os.environ.get("VLLM_USE_FLASHINFER_SAMPLER") == (None if installed else "0")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")  # Undone with the rest.


def test_a_checkout_is_a_plugin_without_being_installed(tmp_path):
    """As on the lent machine: no pip, the two folders on PYTHONPATH."""
    code = (
        "import importlib.metadata, sys; from pathlib import Path\n"
        "from benchmarks.gpu.checkout import entry_points_folder\n"
        f"folder = entry_points_folder(Path({str(ROOT)!r}), Path({str(tmp_path)!r}))\n"
        "sys.path.insert(0, str(folder))\n"
        "assert importlib.metadata.version('vllm-layerskip')\n"
        "for group in ('vllm.general_plugins', 'vllm.platform_plugins', 'console_scripts'):\n"
        "    (entry,) = importlib.metadata.entry_points(group=group)\n"
        "    print(entry.name, entry.value)\n"
    )
    process = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    declared = importlib.metadata.distribution("vllm-layerskip").entry_points
    expected = {f"{entry.name} {entry.value}" for entry in declared}
    assert set(process.stdout.split("\n")) - {""} == expected
