# SPDX-License-Identifier: Apache-2.0
"""LayerSkip's own Prometheus series, beside vLLM's ``vllm:spec_decode_*``.

They appear where vLLM's do: on a server's ``/metrics`` (with several API servers and data
parallel ranks, in Ray's metrics too) and in ``LLM.get_metrics()``, labelled with
``model_name`` and ``engine``. Without statistics (``--disable-log-stats``) there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm_layerskip import __version__
from vllm_layerskip.host import version
from vllm_layerskip.host.wrap import wrap
from vllm_layerskip.metrics.step_counts import StepCounts, take_step_counts

PREFIX = "vllm_layerskip:"
_LLM_ENGINE_MODULE = "vllm.v1.engine.llm_engine"
_LOGGER = "_layerskip_logger"
_LABELS = ("model_name", "engine")

_VERIFY_STEPS = (
    (
        "num_verify_steps_reused",
        "Verify steps that started from the drafts' exit states: the early stage ran for one "
        "token per request.",
    ),
    ("num_verify_steps_full", "Verify steps that ran the early stage for every token."),
)
"""Name and documentation, in the order of ``StepCounts``."""

_MEMORY = (
    "draft_memory_bytes",
    "Memory on one rank that drafting needs beside the model: exit states, the draft twin's layers "
    "(draft_quantization, draft_adapter) and the drafts' own LM head.",
)
_MEMORY_OF = ("exit_states", "twin_layers", "draft_head")
"""Labels of ``_MEMORY``, in the order of ``StepCounts``."""

_DRAFT_TOKENS = (
    "num_draft_tokens_per_pos",
    "Drafted tokens that were verified, by position. With a schedule of numbers of drafts, "
    "vllm:spec_decode_num_accepted_tokens_per_pos divided by this is the acceptance rate of a "
    "position.",
)


class LayerSkipStatLogger:
    """The series of the engines that one front end serves.

    vLLM's loggers say whether counters and gauges are Prometheus's or Ray's.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int], prometheus_logger: Any) -> None:
        self.num_speculative_tokens: int = vllm_config.speculative_config.num_speculative_tokens
        self._loggers = prometheus_logger
        name = vllm_config.model_config.served_model_name
        engines = {index: (name, str(index)) for index in engine_indexes}
        steps = [self._counter(*series) for series in _VERIFY_STEPS]
        self.verify_steps = {
            index: [counter.labels(*labels) for counter in steps]
            for index, labels in engines.items()
        }
        drafted = self._counter(*_DRAFT_TOKENS, "position")
        positions = [str(position) for position in range(self.num_speculative_tokens)]
        self.draft_tokens = {
            index: [drafted.labels(*labels, position) for position in positions]
            for index, labels in engines.items()
        }
        memory = self._gauge(*_MEMORY, "of")
        self.memory = {
            index: [memory.labels(*labels, of) for of in _MEMORY_OF]
            for index, labels in engines.items()
        }
        for series in self.memory.values():
            for child in series:
                child.set(0)  # Several front ends export only what was set.
        self._set_config_info(config_info(vllm_config), engines.values())

    def _counter(self, name: str, documentation: str, *more_labels: str) -> Any:
        return self._loggers._counter_cls(
            name=PREFIX + name, documentation=documentation, labelnames=[*_LABELS, *more_labels]
        )

    def _gauge(self, name: str, documentation: str, *more_labels: str) -> Any:
        return self._loggers._gauge_cls(
            name=PREFIX + name,
            documentation=documentation,
            multiprocess_mode="mostrecent",
            labelnames=[*_LABELS, *more_labels],
        )

    def _set_config_info(self, info: dict[str, str], engines: Iterable[tuple[str, str]]) -> None:
        gauge = self._gauge(
            "config_info", "The engine's LayerSkip settings, as labels; the value is 1.", *info
        )
        for labels in engines:
            gauge.labels(*labels, *info.values()).set(1)

    def record(self, counts: StepCounts, scheduler_stats: Any, engine_index: int) -> None:
        num_series = len(_VERIFY_STEPS)
        for counter, count in zip(
            self.verify_steps[engine_index], counts[:num_series], strict=True
        ):
            counter.inc(count)
        for gauge, num_bytes in zip(self.memory[engine_index], counts[num_series:], strict=True):
            if num_bytes:  # Sent once.
                gauge.set(num_bytes)
        stats = scheduler_stats.spec_decoding_stats
        if stats is not None:
            drafted = zip(
                self.draft_tokens[engine_index], stats.num_draft_tokens_per_pos, strict=True
            )
            for counter, count in drafted:
                counter.inc(count)


def config_info(vllm_config: Any) -> dict[str, str]:
    """Labels of ``config_info``."""
    config = vllm_config.speculative_config
    draft_vocab = config.draft_vocab
    return {
        "exit_layer": str(config.exit_layer),
        "num_hidden_layers": str(vllm_config.model_config.get_total_num_hidden_layers()),
        "num_speculative_tokens": str(config.num_speculative_tokens),
        "reuse_exit_states": str(config.reuse_exit_states).lower(),
        "draft_vocab_size": "all" if draft_vocab is None else str(len(draft_vocab)),
        "draft_quantization": config.draft_quantization,
        "draft_adapter": "none" if config.draft_adapter is None else config.draft_adapter.digest,
        "vllm_layerskip_version": __version__,
        "vllm_version": version.vllm_version(),
    }


def export_from_front_ends() -> None:
    """Give this process's LayerSkip engines our series; other engines keep vLLM's alone."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    wrap(StatLoggerManager, "__init__", _init)
    wrap(StatLoggerManager, "record", _record)


def _init(original: Callable) -> Callable:
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        # Like vLLM's, they belong to the process: a new engine's replace the last one's.
        _unregister()
        from vllm_layerskip.config.layerskip_config import LayerSkipConfig

        if isinstance(vllm_config.speculative_config, LayerSkipConfig):
            logger = LayerSkipStatLogger(
                vllm_config, self.engine_indexes, _prometheus_logger(self.stat_loggers)
            )
            setattr(self, _LOGGER, logger)
            _wrap_get_metrics()

    return init


def _record(original: Callable) -> Callable:
    def record(
        self: Any,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        logger: LayerSkipStatLogger | None = getattr(self, _LOGGER, None)
        if logger is not None and scheduler_stats is not None:
            counts = take_step_counts(scheduler_stats, logger.num_speculative_tokens)
            logger.record(counts, scheduler_stats, engine_idx or 0)
        original(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    return record


def _prometheus_logger(stat_loggers: list[Any]) -> Any:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    return next(logger for logger in stat_loggers if isinstance(logger, PrometheusStatLogger))


def _unregister() -> None:
    from prometheus_client import REGISTRY

    for collector, names in list(REGISTRY._collector_to_names.items()):
        if any(name.startswith(PREFIX) for name in names):
            REGISTRY.unregister(collector)


def _wrap_get_metrics() -> None:
    # An asynchronous engine's process may not have imported it.
    llm_engine = sys.modules.get(_LLM_ENGINE_MODULE)
    if llm_engine is not None:
        wrap(llm_engine.LLMEngine, "get_metrics", _get_metrics)


def _get_metrics(original: Callable) -> Callable:
    def get_metrics(self: Any) -> list[Any]:
        return [*original(self), *_snapshot()]

    return get_metrics


def _snapshot() -> Iterator[Any]:
    """Our series in the form of vLLM's ``get_metrics``, which reports names with ``vllm:`` only."""
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.reader import Counter, Gauge

    for metric in REGISTRY.collect():
        if not metric.name.startswith(PREFIX):
            continue
        # A counter also has a sample with the time of its creation.
        samples = [s for s in metric.samples if s.name in (metric.name, f"{metric.name}_total")]
        if metric.name == PREFIX + _DRAFT_TOKENS[0]:
            yield from _vectors(metric.name, samples)
        elif metric.type == "counter":
            for sample in samples:
                yield Counter(name=metric.name, labels=sample.labels, value=int(sample.value))
        else:
            for sample in samples:
                yield Gauge(name=metric.name, labels=sample.labels, value=sample.value)


def _vectors(name: str, samples: Iterable[Any]) -> Iterator[Any]:
    """One vector for each engine, its positions in the order in which they were made."""
    from vllm.v1.metrics.reader import Vector

    vectors: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for sample in samples:
        labels = tuple((k, v) for k, v in sample.labels.items() if k != "position")
        vectors.setdefault(labels, []).append(int(sample.value))
    for labels, values in vectors.items():
        yield Vector(name=name, labels=dict(labels), values=values)
