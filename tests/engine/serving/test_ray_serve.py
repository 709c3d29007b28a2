# SPDX-License-Identifier: Apache-2.0
"""examples/ray_serve.py: a LayerSkip replica behind Ray Serve's OpenAI API, on CPUs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from checkpoints import EMBEDDED

ROOT = Path(__file__).parents[3]
MAX_TOKENS = 24


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _post(port: int, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_answers_with_plain_vllms_tokens(pool, tokenizer, tmp_path, port):
    pytest.importorskip("ray.serve.llm")
    prompt = [tokenizer.bos_token_id, *tokenizer("def main():\n")["input_ids"]]
    (expected,) = pool.get(EMBEDDED).greedy([prompt], MAX_TOKENS)
    log = tmp_path / "log"
    command = [sys.executable, str(ROOT / "examples" / "ray_serve.py"), "--cpu"]
    command += ["--model", str(EMBEDDED), "--max-model-len", "256", "--port", str(port)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        answer = _first_answer(process, port, prompt, log)
        (choice,) = answer["choices"]
        assert choice["token_ids"] == expected
        drafting = answer["metrics"]["speculative_decoding"]
        assert drafting["num_draft_tokens"] > 0, answer
        assert sum(drafting["acceptance_histogram"][1:]) > 0
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        stop = [str(Path(sys.executable).with_name("ray")), "stop", "--force"]
        subprocess.run(stop, check=False, capture_output=True)


def _first_answer(process: subprocess.Popen, port: int, prompt: list[int], log: Path) -> dict:
    body = {
        "model": "layerskip", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            return _post(port, body)
        except OSError:
            time.sleep(2)
    raise TimeoutError(log.read_text()[-6000:])
