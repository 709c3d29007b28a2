# SPDX-License-Identifier: Apache-2.0
"""Runs scripts of this folder in processes of their own, and returns what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 500


def run_script(
    script: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (sys.executable,),
) -> tuple[list[Any], str]:
    """Run a script whose processes print ``RESULT`` and JSON; return results and all output.

    Args:
        environment: variables besides this process's. vLLM's engine gets a process of its own.
        launcher: command that starts the script, in one process or several.
    """
    process = subprocess.run(
        [*launcher, str(HERE / script), *arguments],
        env={
            **os.environ,
            **python_path(HERE),  # Every process of an engine must find worker extensions.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, process.stdout[-4000:] + process.stderr[-6000:]
    return (
        [json.loads(line.removeprefix("RESULT ")) for line in lines],
        process.stdout + process.stderr,
    )


def python_path(*folders: Path) -> dict[str, str]:
    """Variables with which Python looks for modules in these folders first."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *inherited])}
