# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in a process of its own, for tests that talk to it as a client does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
            "--max-num-seqs", "16",
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
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
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
        self.close()
        raise TimeoutError(self.log.read_text()[-6000:])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self._url(path), timeout=60) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> str:
        with self._open(path, body) as answer:
            return answer.read().decode()

    def refusal(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of a request that the server must refuse."""
        try:
            answer = self.post(path, body)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        raise AssertionError(f"{path} served {body}: {answer[:500]}")

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All chunks of a streamed answer."""
        with self._open(path, {**body, "stream": True}) as answer:
            return list(_events(answer))

    def complete(self, prompt: str | list[int], **body: Any) -> dict[str, Any]:
        """A whole answer of ``/v1/completions``, with token ids."""
        return json.loads(self.post("/v1/completions", self._completion(prompt, body)))

    def complete_streaming(self, prompt: str | list[int], **body: Any) -> dict[str, Any]:
        """One streamed choice put together: text, token_ids and why it ended."""
        chunks = self.stream("/v1/completions", self._completion(prompt, body))
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        return {
            "text": "".join(choice["text"] for choice in choices),
            "token_ids": [token for choice in choices for token in choice["token_ids"] or ()],
            "finish_reason": choices[-1]["finish_reason"],
            "stop_reason": choices[-1]["stop_reason"],
            "num_chunks": len(choices),
        }

    def complete_all(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Streamed answers of as many clients as there are requests, all at once."""
        with ThreadPoolExecutor(len(requests)) as clients:
            return list(clients.map(lambda body: self.complete_streaming(**body), requests))

    def abandon(self, prompt: list[int], num_chunks: int, **body: Any) -> None:
        """Close the connection in the middle of a streamed answer."""
        request = self._completion(prompt, {**body, "stream": True})
        with self._open("/v1/completions", request) as answer:
            events = _events(answer)
            for _ in range(num_chunks):
                next(events)

    def chat(self, content: str, **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        request = {"model": MODEL_NAME, "messages": messages, "temperature": 0, **body}
        return json.loads(self.post("/v1/chat/completions", request))

    def counter(self, name: str) -> float:
        """One of vLLM's ``vllm:spec_decode_*`` counters, summed over all label sets."""
        return self.metric(f"vllm:spec_decode_{name}")

    def metric(self, name: str) -> float:
        values = re.findall(
            rf"^{re.escape(name)}{{[^}}]*}} ([0-9.e+-]+)$", self.get("/metrics"), re.M
        )
        assert values, f"/metrics has no {name}"
        return sum(map(float, values))

    def wait_until_idle(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while self.metric("vllm:num_requests_running") or self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "requests still run that nobody waits for"
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # The engine's process, too.
            self.process.wait()

    @staticmethod
    def _completion(prompt: str | list[int], body: dict[str, Any]) -> dict[str, Any]:
        defaults = {"temperature": 0, "return_token_ids": True}
        return {"model": MODEL_NAME, "prompt": prompt, **defaults, **body}

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url(path),
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """Server-sent events up to ``[DONE]``, which must come."""
    for line in answer:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)
    raise AssertionError("the stream ended without [DONE]")
