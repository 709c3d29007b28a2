# SPDX-License-Identifier: Apache-2.0
"""Catch a console script that is slow to start, shows a traceback for a user's mistake or hides
a defect."""

import subprocess
import sys
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.commands import COMMANDS
from vllm_layerskip.commands import draft_vocab as command
from vllm_layerskip.commands import main as cli


def test_starting_loads_nothing_heavy():
    heavy = ("vllm", "torch", "transformers", "numpy", "tqdm")
    code = (
        "import sys\nfrom vllm_layerskip.commands.main import build_parser\nbuild_parser()\n"
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["draft-vocab", "--help"]])
def test_help_and_version_end_well(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    output = capsys.readouterr().out
    if argv == ["--version"]:
        assert output.startswith(f"vllm-layerskip {vllm_layerskip.__version__} (vLLM 0.")
    elif argv == ["--help"]:
        assert all(command.name in output for command in COMMANDS)
    else:
        assert f"vllm-layerskip {argv[0]}" in output


@pytest.mark.parametrize("argv", [[], ["no-such-command"]])
def test_without_a_command_the_usage_is_shown(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: vllm-layerskip" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["draft-vocab"], ["draft-vocab", "--corpus"], ["train", "-x"]])
def test_a_malformed_command_line_is_told_in_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-layerskip {argv[0]}: error: ")
    assert line.endswith(f". See vllm-layerskip {argv[0]} --help.")


def test_the_script_that_pip_installs_is_this_one():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["vllm-layerskip"].partition(":")
    assert (module, name) == (cli.main.__module__, cli.main.__name__)


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise ValueError("a defect")

    monkeypatch.setattr(command, "run", fail)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["draft-vocab", "--model", "m", "--corpus", "c", "--output", "ids"])
