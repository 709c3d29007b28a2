# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm_layerskip.architectures import (
    SUPPORTED_ARCHITECTURES,
    early_exit_architectures,
    early_exit_path,
)
from vllm_layerskip.config import cli_args, early_exit
from vllm_layerskip.config.request import asks_for_layerskip, speculative_request
from vllm_layerskip.cpu.triton_interpreter import interpret_mode
from vllm_layerskip.host import check, version
from vllm_layerskip.host.wrap import wrap, wrap_init_speculator
from vllm_layerskip.metrics import prometheus, step_counts
from vllm_layerskip.worker import weight_changes

logger = logging.getLogger("vllm.layerskip")


def register() -> None:
    """Make LayerSkip available (entry point ``vllm.general_plugins``).

    Never raises, may be called again, and changes nothing for an engine that does not ask
    for LayerSkip: every wrapper hands such an engine straight to vLLM's own function.
    """
    for step in (
        version.warn_of_untested_vllm,
        _register_models,
        _wrap_engine_args,
        _wrap_speculator,
        _wrap_scheduler,
        _replace_cpu_kernels,
    ):
        try:
            step()
        except Exception:
            logger.warning(
                "vllm-layerskip could not register with vLLM %s (%s); LayerSkip is not "
                "available, everything else is unaffected.",
                version.vllm_version(),
                step.__name__,
                exc_info=True,
            )


def _register_models() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for model in dict.fromkeys(SUPPORTED_ARCHITECTURES.values()):
        ModelRegistry.register_model(model.architecture, model.path)
    for architecture, name in early_exit_architectures().items():
        ModelRegistry.register_model(name, early_exit_path(architecture))


def _wrap_engine_args() -> None:
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "create_speculative_config", _create_speculative_config)
    wrap(EngineArgs, "add_cli_args", cli_args.wrap_add_cli_args)
    wrap(EngineArgs, "from_cli_args", cli_args.wrap_from_cli_args)
    wrap(EngineArgs, "create_model_config", _create_model_config)


def _wrap_speculator() -> None:
    wrap_init_speculator(_init_speculator)


def _wrap_scheduler() -> None:
    from vllm.config.scheduler import SchedulerConfig

    wrap(SchedulerConfig, "get_scheduler_cls", _get_scheduler_cls)


def _replace_cpu_kernels() -> None:
    from vllm.platforms import current_platform

    if interpret_mode() and current_platform.is_cpu():
        from vllm_layerskip.cpu import kernels

        kernels.register()


def _create_model_config(original: Callable) -> Callable:
    def create_model_config(self: Any) -> Any:
        request = early_exit.find_request(self.hf_overrides)
        if request is None:
            return original(self)
        check.require_supported_vllm()
        early_exit.refuse_speculation(request, speculative_request(self))
        # Built twice: for the whole model, to see its layers, and for the part that is served.
        given = self.hf_overrides
        try:
            self.hf_overrides = request.other_overrides
            self.hf_overrides = early_exit.cut_overrides(request, original(self))
            return original(self)
        finally:
            self.hf_overrides = given

    return create_model_config


def _create_speculative_config(original: Callable) -> Callable:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        request = speculative_request(self)
        if not asks_for_layerskip(request):
            return original(self, target_model_config, target_parallel_config)
        check.require_supported_vllm()
        from vllm_layerskip.config.layerskip_config import build_config

        prometheus.export_from_front_ends()
        return build_config(request, self, target_model_config, target_parallel_config)

    return create_speculative_config


def _get_scheduler_cls(original: Callable) -> Callable:
    """Wrapped because it runs in the process of the engine's core, once an engine, when the
    executor is there and the scheduler's class is known; other processes import nothing for it."""
    with_step_counts = step_counts.wrap_get_scheduler_cls(original)

    def get_scheduler_cls(self: Any) -> Any:
        weight_changes.watch_executors()
        return with_step_counts(self)

    return get_scheduler_cls


def _init_speculator(original: Callable) -> Callable:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        from vllm_layerskip.config.layerskip_config import LayerSkipConfig

        if not isinstance(vllm_config.speculative_config, LayerSkipConfig):
            return original(vllm_config, device, req_states)
        from vllm_layerskip.worker.decode_graphs import offer_all_decode_graphs
        from vllm_layerskip.worker.speculator import LayerSkipSpeculator

        offer_all_decode_graphs()
        step_counts.send_from_workers()
        return LayerSkipSpeculator(vllm_config, device)

    return init_speculator
