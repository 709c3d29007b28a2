# SPDX-License-Identifier: Apache-2.0
"""Catch a draft head whose logits are not the model's, ranks that draft different tokens, and
rows that stay behind when weights are loaded anew.

Runs vLLM's own vocabulary-parallel layers on two ranks, each a process; see the script.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TIMEOUT_S = 240


def test_a_draft_head_on_two_ranks(tmp_path):
    script = Path(__file__).with_name("draft_head_rank.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_DIST_IDENT": str(os.getpid())}
    logs = [tmp_path / f"rank{rank}" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, script, str(rank), tmp_path / "rendezvous"]
        with log.open("w") as output:
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        # A rank that waits for one that failed would wait for ever.
        deadline = time.monotonic() + TIMEOUT_S
        while any(rank.poll() is None for rank in ranks) and not any(
            rank.returncode for rank in ranks
        ):
            assert time.monotonic() < deadline, "the ranks do not end"
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
    for rank, log in zip(ranks, logs, strict=True):
        if rank.returncode is not None and rank.returncode > 0:
            pytest.fail(log.read_text()[-6000:])
    assert all("all checks passed" in log.read_text() for log in logs)
