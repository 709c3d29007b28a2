# SPDX-License-Identifier: Apache-2.0
"""Catch a command that does not hand its options on, or does not say what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_layerskip.commands.main import main
from vllm_layerskip.errors import UserError
from vllm_layerskip.example_model import make


@pytest.fixture
def calls(monkeypatch):
    """What ``example_model`` is called with."""
    found = []

    def example_model(folder, **options):
        found.append((folder, options))
        return folder or Path("/cache/example")

    monkeypatch.setattr(make, "example_model", example_model)
    return found


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        ([], (None, {"source": None, "overwrite": False})),
        (["here"], (Path("here"), {"source": None, "overwrite": False})),
        (
            ["here", "--from", "there", "--overwrite"],
            (Path("here"), {"source": Path("there"), "overwrite": True}),
        ),
    ],
)
def test_options_are_handed_on(calls, argv, call):
    assert main(["example-model", *argv]) == 0
    assert calls == [call]


def test_it_ends_with_the_folder_and_how_to_serve_it(calls, capsys):
    assert main(["example-model", "my folder"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "my folder",
        "Serve it with: vllm serve 'my folder' --speculative-model '[self]'",
    ]


def test_a_mistake_is_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise UserError("FOLDER x: it is a file. Give a new folder.")

    monkeypatch.setattr(make, "example_model", fail)
    assert main(["example-model", "x"]) == 2
    assert capsys.readouterr().err == (
        "vllm-layerskip example-model: error: FOLDER x: it is a file. Give a new folder.\n"
    )
