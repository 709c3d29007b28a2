# SPDX-License-Identifier: Apache-2.0
"""Tells a worker's model that its weights may have changed.

Exit states and the draft head are made from weights, and vLLM has many ways to change weights: a
reload, a transfer from a trainer, sleep, a user's function. Some go through ``load_weights``;
others write tensors in place, through ``.data`` or from another process, and leave no trace on
them. But all of them reach a worker as a remote call, beside the calls of a step. So any call that
is not known to leave weights alone counts as a change: before it runs, every worker's
``model.num_weight_changes`` goes up. Whatever is made from weights compares that number.

The call is announced by the executor and not noticed by the worker, so that all ranks agree: a
user's function may touch the weights of one rank only, and ranks that disagree about a verify step
would wait for each other forever.

Counting a call that changed nothing costs one verify step without reuse, and with a draft twin the
time to make it again. Importing this module imports no vLLM.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from vllm_layerskip.host.contacts import EXECUTOR_MODULE
from vllm_layerskip.host.wrap import wrap

LEAVE_WEIGHTS_ALONE = frozenset(
    {
        # A step's.
        "execute_dummy_batch",
        "execute_model",
        "sample_tokens",
        "take_draft_token_ids",
        # Others that vLLM makes while requests run.
        "check_health",
        "compute_weight_checksums",
        "list_loras",
        "profile",
        "reset_encoder_cache",
        "reset_mm_cache",
        "save_sharded_state",
        "synchronize_device",
        # Of every start, after the weights are loaded.
        "compile_or_warm_up_model",
        "determine_available_memory",
        "get_kv_cache_spec",
        "get_kv_connector_handshake_metadata",
        "get_supported_kv_cache_layouts",
        "get_supported_tasks",
        "initialize_from_config",
        "set_kv_cache_layout",
        "supports_draft_weight_updates",
        "update_max_model_len",
        # Before there is a model to tell, and when nobody answers any more.
        "adjust_rank",
        "init_device",
        "init_worker",
        "load_model",
        "shutdown",
        "update_environment_variables",
    }
)
"""Names of remote calls after which exit states stay valid."""


def watch_executors() -> None:
    """Have every executor class that is loaded announce calls that may change weights.

    Call it in the process of the engine's core, where the executor is.
    """
    # Imported already: the engine's core has an executor.
    for cls in _subclasses(importlib.import_module(EXECUTOR_MODULE).Executor):
        if "collective_rpc" in vars(cls):
            wrap(cls, "collective_rpc", _collective_rpc)


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _collective_rpc(original: Callable) -> Callable:
    from vllm_layerskip.config.layerskip_config import LayerSkipConfig

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(method, str) and method in LEAVE_WEIGHTS_ALONE) and isinstance(
            self.speculative_config, LayerSkipConfig
        ):
            # A call that may take only so long is not announced for longer.
            timeout = kwargs.get("timeout", args[0] if args else None)
            original(self, count_weight_change, timeout)
        return original(self, method, *args, **kwargs)

    return collective_rpc


def count_weight_change(worker: Any) -> None:
    """Runs in each worker, before the call that it announces."""
    worker.get_model().num_weight_changes += 1
