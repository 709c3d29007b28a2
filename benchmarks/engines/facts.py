# SPDX-License-Identifier: Apache-2.0
"""What a running vLLM engine says about itself: memory of its parts, drafts and acceptance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_layerskip.metrics.prometheus import PREFIX

if TYPE_CHECKING:
    from vllm import LLM

_PREFIX = "vllm:spec_decode_num_"
_COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")
_VERIFY_STEPS = ("num_verify_steps_reused", "num_verify_steps_full")


def speculation_counts(llm: LLM, mode: str) -> dict[str, Any] | None:
    """Counters since the engine's start, None where it does not speculate.

    They are metrics: vLLM's own for any method, and a LayerSkip engine's of its verify steps.
    """
    metrics: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    if f"{_PREFIX}drafts" not in metrics:
        return None
    counts: dict[str, Any] = {
        f"num_{name}": int(metrics[f"{_PREFIX}{name}"].value) for name in _COUNTERS
    }
    per_position = metrics[f"{_PREFIX}accepted_tokens_per_pos"].values
    counts["num_accepted_tokens_per_pos"] = [int(value) for value in per_position]
    if mode.startswith("layerskip"):
        counts |= {name: int(metrics[f"{PREFIX}{name}"].value) for name in _VERIFY_STEPS}
    return counts


def speculation_between(
    before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The difference of two counts, with acceptance length and rates."""
    if before is None or after is None:
        return None
    counts: dict[str, Any] = {
        name: [a - b for a, b in zip(value, before[name], strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in after.items()
    }
    num_drafts: int = counts["num_drafts"]
    if num_drafts:
        counts["acceptance_length"] = round(1 + counts["num_accepted_tokens"] / num_drafts, 4)
        per_position = counts.pop("num_accepted_tokens_per_pos")
        counts["acceptance_rates"] = [round(count / num_drafts, 4) for count in per_position]
    return counts


def worker_memory(worker: Any) -> dict[str, int]:
    """Bytes of a worker's parts; runs inside it (``LLM.collective_rpc``).

    Weights and KV cache are counted by storage, so what two owners share counts once. On a CPU
    the target's weights are left out: vLLM packs them, and they are no parameters of the model any
    more. A draft twin counts its own.
    """
    import torch

    runner = worker.model_runner
    speculator = getattr(runner, "speculator", None)
    facts = {"kv_cache_bytes": sum(_storages(_tensors(runner.kv_caches)).values())}
    draft_state = getattr(speculator, "draft_state", None)  # LayerSkip's speculator has one.
    if draft_state is not None:
        exit_states = draft_state.exit_states  # A draft twin reuses none.
        facts["exit_state_bytes"] = 0 if exit_states is None else exit_states.num_bytes
    twin = getattr(speculator, "draft_twin", None)
    if twin is not None:
        facts["twin_bytes"] = twin.num_bytes + twin.num_head_bytes
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        target = _storages(runner.model.parameters())
        draft = _storages(_parameters(getattr(speculator, "model", None)))
        facts |= {
            "weights_bytes": sum(target.values()),
            "draft_weights_bytes": sum(draft[key] for key in draft.keys() - target.keys()),
            "torch_allocated_bytes": torch.cuda.memory_allocated(),
            "torch_reserved_bytes": torch.cuda.memory_reserved(),
            "gpu_used_bytes": total - free,
        }
    return facts


def _parameters(model: Any) -> Iterable[Any]:
    return model.parameters() if model is not None else ()


def _tensors(caches: Any) -> Iterable[Any]:
    """Tensors of a KV cache, which may come in nested lists."""
    for cache in caches:
        if isinstance(cache, list | tuple):
            yield from _tensors(cache)
        else:
            yield cache


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def kv_capacity_tokens(llm: LLM) -> int:
    """How many tokens the KV cache holds."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size
