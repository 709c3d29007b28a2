# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with LayerSkip, as a user starts it and a client talks to it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

MODEL_NAME = "layerskip"
START_TIMEOUT_S = 300


class Server:
    """A `vllm serve` process and the few requests that the tests send."""

    def __init__(self, checkpoint: Path, flags: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        command = [
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            str(checkpoint),
            "--served-model-name", MODEL_NAME,
            "--host", "127.0.0.1",
            "--port", str(self.port),
            "--dtype", "float32",
            "--max-model-len", "256",
            "--max-num-seqs", "4",
            "--kv-cache-memory-bytes", str(16 << 20),
            "--enforce-eager",
            *flags,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            try:
                self.get("/health")
            except OSError:
                time.sleep(1)
            else:
                return
        raise TimeoutError(self.log.read_text()[-6000:])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    def stream(self, path: str, body: dict) -> list[dict]:
        text = self.post(path, {**body, "stream": True})
        data = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert data[-1] == "[DONE]"
        return [json.loads(item) for item in data[:-1]]

    def counter(self, name: str) -> float:
        values = re.findall(rf"^vllm:spec_decode_{name}{{[^}}]*}} ([0-9.e+]+)$", self.metrics, re.M)
        assert values, f"/metrics has no vllm:spec_decode_{name}"
        return sum(map(float, values))

    @property
    def metrics(self) -> str:
        return self.get("/metrics")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    flags = ["--speculative-model", "[self]", "--num-speculative-tokens", "5", "--exit-layer", "3"]
    server = Server(checkpoint, flags, tmp_path_factory.mktemp("serve") / "log")
    yield server
    server.close()


def test_completions_stream_plain_vllms_tokens(server, pool, checkpoint, prompts, tokenizer):
    expected = pool.get(checkpoint).greedy([prompts[0]], max_tokens=40)[0]
    chunks = server.stream(
        "/v1/completions",
        {
            "model": MODEL_NAME,
            "prompt": prompts[0],
            "max_tokens": 40,
            "temperature": 0,
            "ignore_eos": True,
        },
    )
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(chunks) > 1, "the answer did not stream"


def test_chat_streams(server):
    chunks = server.stream(
        "/v1/chat/completions",
        {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": "import os\nimport sys\n\n\ndef main("}],
            "max_tokens": 32,
            "temperature": 0,
        },
    )
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert len("".join(deltas)) > 10
    assert sum(bool(delta) for delta in deltas) > 1


def test_requests_with_top_p_and_temperature(server):
    answer = json.loads(
        server.post(
            "/v1/completions",
            {
                "model": MODEL_NAME,
                "prompt": "import os\n",
                "max_tokens": 24,
                "temperature": 0.8,
                "top_p": 0.9,
                "top_k": 50,
                "n": 2,
                "seed": 1,
                "ignore_eos": True,
            },
        )
    )
    assert answer["usage"]["completion_tokens"] == 48


def test_metrics_show_vllms_own_counters(server):
    before = server.counter("num_drafts_total")
    server.post(
        "/v1/completions",
        {
            "model": MODEL_NAME,
            "prompt": "class A:\n    def __init__(self):\n",
            "max_tokens": 40,
            "temperature": 0,
            "ignore_eos": True,
        },
    )
    assert server.counter("num_drafts_total") > before
    accepted, drafted = (
        server.counter("num_accepted_tokens_total"),
        server.counter("num_draft_tokens_total"),
    )
    assert 0 < accepted <= drafted
    assert server.counter("num_accepted_tokens_per_pos_total") == accepted


def test_log_says_what_runs(server):
    lines = [line for line in server.log.read_text().splitlines() if "LayerSkip 0." in line]
    assert len(lines) == 1
    assert "exit_layer 3" in lines[0]
    assert "INFO" in lines[0]
    assert "5 speculative tokens" in lines[0]


def test_bad_flags_end_the_start_before_weights_are_loaded(checkpoint, tmp_path):
    """Seen by the user, not only by a unit test: exit status, message, and no weights read."""
    log = tmp_path / "log"
    with pytest.raises(AssertionError) as error:
        Server(
            checkpoint, ["--spec-model", "[self]", "--spec-tokens", "5", "--exit-layer", "12"], log
        )
    text = str(error.value)
    assert "exit_layer=12 must be an integer from 1 to 11" in text
    assert "Loading weights" not in log.read_text()
