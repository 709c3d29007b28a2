# SPDX-License-Identifier: Apache-2.0
"""A server of a mode: ``vllm serve`` in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.engines.arguments import command_line_flags, engine_arguments
from benchmarks.engines.settings import Settings
from vllm_layerskip.measuring.processes import log_tail, logged_process

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
MODEL_NAME = "benchmark"
START_TIMEOUT_S = 600


@contextmanager
def server(
    settings: Settings, mode: str, tokenizer: Path, log: Path
) -> Iterator[tuple[str, float]]:
    """``vllm serve``, ready: its URL and the seconds that its start took.

    Raises:
        RuntimeError: it ended before it was ready; the message holds the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = engine_arguments(settings, mode, Path(folder))
        # Requests come as text.
        arguments |= {"skip_tokenizer_init": False, "tokenizer": str(tokenizer)}
        arguments |= {"enable_prefix_caching": False}
        del arguments["disable_log_stats"]
        port = _free_port()
        command = [*VLLM, "serve", arguments["model"]]
        command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
        start = time.monotonic()
        command += command_line_flags(arguments)
        # A server's engine lives in a process of its own, on a CPU too.
        with logged_process(command, log, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) as process:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, url, log)
            yield url, round(time.monotonic() - start, 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {process.returncode}: {log_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"vllm serve was not ready after {START_TIMEOUT_S} s: {log_tail(log)}")
