# SPDX-License-Identifier: Apache-2.0
"""Catch a job whose failure is told in many lines, or without what went wrong."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning import process_jobs, worker


def test_a_workers_mistake_of_the_user_is_its_last_line(tmp_path, monkeypatch):
    def results(request):
        yield {"n": request["n"]}
        raise UserError("--dtype nonsense: no dtype.")

    request, output = tmp_path / "request.json", tmp_path / "results.jsonl"
    request.write_text('{"n": 1}')
    monkeypatch.setattr(worker, "results", results)
    monkeypatch.setattr(sys, "argv", ["worker", str(request), str(output)])
    worker.main()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [{"n": 1}, {"user_error": "--dtype nonsense: no dtype."}]


@pytest.fixture
def run_body(tmp_path, monkeypatch):
    """``run_body(body)``: the results of a job whose process runs ``body``."""

    @contextlib.contextmanager
    def logged_process(command, log, environment):
        code = f"import json, sys\noutput = open(sys.argv[2], 'a')\n{body[0]}"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *command[-2:]], stdout=stream, stderr=stream
            )
            yield process

    body = [""]
    monkeypatch.setattr(process_jobs, "logged_process", logged_process)

    def run(text):
        body[0] = text
        return list(process_jobs.run_job({}, "cpu", tmp_path / "job.log"))

    return run


def test_results_come_in_order(run_body):
    assert run_body("print(json.dumps({'n': 1}), file=output)") == [{"n": 1}]


def test_a_mistake_of_the_user_has_its_own_words(run_body):
    body = "print(json.dumps({'user_error': '--dtype x: no dtype.'}), file=output, flush=True)"
    with pytest.raises(UserError) as failed:
        run_body(body)
    assert str(failed.value) == "--dtype x: no dtype."


def test_another_failure_is_one_line_with_the_error_and_the_log(run_body, tmp_path):
    with pytest.raises(UserError) as failed:
        run_body("raise ValueError('a bug')")
    assert str(failed.value) == (
        "a process that loads the model failed with exit status 1: ValueError: a bug. Its log: "
        f"{tmp_path / 'job.log'}"
    )
