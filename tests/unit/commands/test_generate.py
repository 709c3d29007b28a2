# SPDX-License-Identifier: Apache-2.0
"""Catch an option of `generate` that gets lost, and a wrong one that is not explained."""

from __future__ import annotations

import json

import pytest

from vllm_layerskip.batch import one_engine
from vllm_layerskip.batch.output import Answer
from vllm_layerskip.commands.main import main


def _generate(folder, *options):
    (folder / "in.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    paths = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "o")]
    return main(["generate", "--model", "m", "--device", "cpu", *paths, *options])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--num-replicas", "0"], "--num-replicas 0 must be an integer of at least 1"),
        (["--temperature", "-1"], "command line: temperature=-1.0 must be a number from 0 to 2"),
        (["--no-speculation", "--exit-layer", "3"], "--no-speculation excludes --exit-layer 3"),
        (["--engine-args", '{"model": "x"}'], "model cannot be given there. Use --model"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, error):
    assert _generate(tmp_path, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-layerskip generate: error: ")
    assert error in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("value", ["eight", "8.0", "", "AUTO"])
def test_a_wrong_exit_layer_is_named_with_the_valid_ones(tmp_path, capsys, value):
    with pytest.raises(SystemExit) as stop:
        _generate(tmp_path, "--exit-layer", value)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vllm-layerskip generate: error: argument --exit-layer: ")
    assert f"{value!r} must be an integer, 'auto' or 'all'" in last
    assert not (tmp_path / "o").exists()


def test_options_reach_the_engine(tmp_path, monkeypatch, capsys):
    seen = []

    def answers(rows, settings):
        seen.append(settings)
        return (Answer(row.index, "b", (1,), "stop", 1, None, 2, 3) for row in rows)

    monkeypatch.setattr(one_engine, "answers", answers)
    options = ["--exit-layer", "8", "--num-speculative-tokens", "3", "--top-k", "5"]
    assert _generate(tmp_path, *options) == 0
    assert _generate(tmp_path, *options) == 0
    (settings,) = seen
    assert settings.speculative_config == {
        "method": "layerskip",
        "exit_layer": 8,
        "num_speculative_tokens": 3,
    }
    assert settings.engine_args == {"dtype": "float32"}
    assert settings.sampling_params["top_k"] == 5
    output = tmp_path / "o" / "output.jsonl"
    first, this_run, again = capsys.readouterr().out.splitlines()
    assert first == f"1 rows, of which 0 with an error, 1 tokens: {output}"
    assert this_run.startswith("This run: 1 rows in ")
    assert this_run.endswith("with the engines' start, acceptance length 2.5.")
    assert again == f"{output} is there already, and whole. --overwrite makes it anew."


@pytest.mark.parametrize("value", ["8", "auto"])
def test_the_exit_layer_has_the_type_that_vllm_serve_gives_it(value):
    from vllm_layerskip.commands.main import build_parser
    from vllm_layerskip.config.cli_args import exit_layer_argument

    argv = ["generate", "--model", "m", "--input", "i", "--output", "o", "--exit-layer", value]
    assert build_parser().parse_args(argv).exit_layer == exit_layer_argument(value)


def test_a_job_without_any_answer_fails_and_says_why(tmp_path, capsys):
    """Else a script would go on with an output that has nothing in it."""
    (tmp_path / "in.jsonl").write_text('{"question": "a"}\n{oops\n')
    paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o")]
    assert main(["generate", "--model", "m", "--device", "cpu", *paths]) == 2
    printed = capsys.readouterr()
    assert "2 rows, of which 2 with an error" in printed.out
    assert "error: no row could be answered. The first one: a row must have one of" in printed.err
    assert (tmp_path / "o/output.jsonl").read_text().count("\n") == 2
