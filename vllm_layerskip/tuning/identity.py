# SPDX-License-Identifier: Apache-2.0
"""What a measurement depends on besides its draft, E, K and batch size; the digest of all that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_layerskip.measuring.hardware import gpu_info
from vllm_layerskip.measuring.provenance import code_digest, cpu_model, versions
from vllm_layerskip.tuning.jobs import EngineSettings, Workload


def settings_digest(identity: Mapping[str, Any]) -> str:
    """The first digits of a SHA-256 over everything that a measurement depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def identity_of(
    config: Mapping[str, Any],
    engine: EngineSettings,
    workload: Workload,
    draft_vocab: Sequence[int] | None,
    machine: str | None,
) -> dict[str, Any]:
    """Everything that measurements under these settings depend on.

    The checkpoint's ``layerskip`` block is left out: each cell states its E, its K and its draft,
    an adapter by its content's digest. So the folders of adapters are left out, too.

    Args:
        config: the checkpoint's config.json.
        machine: GPU or CPU model; None for this machine's.
    """
    prompts = hashlib.sha256(json.dumps([workload.prompts, draft_vocab]).encode()).hexdigest()
    return {
        "config": {
            k: v for k, v in config.items() if k not in ("layerskip", "transformers_version")
        },
        "engine": {k: v for k, v in asdict(engine).items() if k != "draft_adapters"},
        "load": {k: v for k, v in asdict(workload).items() if k not in ("prompts", "batch_sizes")},
        "max_num_seqs": max(workload.batch_sizes),
        "prompts": prompts[:12],
        "weights": _weights(Path(engine.model)),
        "machine": machine or this_machine(),
        "versions": versions(),
        "code": code_digest(),
    }


def this_machine() -> str | None:
    """The model of this machine's GPU, or of its CPU without one."""
    return (gpu_info() or {}).get("name") or cpu_model()


def _weights(folder: Path) -> list[list[Any]] | None:
    """Names, sizes and times of a folder's weights: a retrained checkpoint is another one."""
    if not folder.is_dir():
        return None
    files = (path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
