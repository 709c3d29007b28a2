# SPDX-License-Identifier: Apache-2.0
"""Engine settings that LayerSkip refuses, decided before weights are loaded.

``REFUSED`` is the whole list; ``docs/features.md`` has a row for each (a test compares them). A
setting is refused when it is known to break a draft pass, or when nobody has seen it give plain
vLLM's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_layerskip.config.options import LayerSkipOptions
from vllm_layerskip.twins.kinds import KINDS, NONE

_ELSE = "Change it, or use another speculative method."


@dataclass(frozen=True)
class Setting:
    """An engine setting with the only values that LayerSkip runs with."""

    name: str
    """Its name in ``EngineArgs`` and on the command line."""
    why: str
    """What LayerSkip lacks, or what would go wrong."""
    only: tuple[Any, ...]
    """The valid values, the default first."""
    read: Callable[[Any, Any], Any] | None = None
    """Reads the value from (EngineArgs, ParallelConfig); None reads EngineArgs' attribute."""

    def value(self, engine_args: Any, parallel_config: Any) -> Any:
        if self.read is None:
            return getattr(engine_args, self.name)
        return self.read(engine_args, parallel_config)


def _of_parallel_config(name: str) -> Callable[[Any, Any], Any]:
    # vLLM has resolved the defaults there.
    return lambda engine_args, parallel_config: getattr(parallel_config, name)


_ONE_RANK = "the early layers, the late ones and the drafts' K/V must be on the same rank"
_CONNECTOR = (
    "draft passes write the target's K/V under its layers' names, which a KV connector would "
    "take for verified K/V"
)

REFUSED: tuple[Setting, ...] = (
    Setting(
        "pipeline_parallel_size", _ONE_RANK, (1,), _of_parallel_config("pipeline_parallel_size")
    ),
    Setting(
        "decode_context_parallel_size",
        _ONE_RANK,
        (1,),
        _of_parallel_config("decode_context_parallel_size"),
    ),
    Setting(
        "prefill_context_parallel_size",
        _ONE_RANK,
        (1,),
        _of_parallel_config("prefill_context_parallel_size"),
    ),
    Setting(
        "use_ubatching (enable_dbo, ubatch_size)",
        "a verify step that is cut in two has no place for exit states",
        (False,),
        _of_parallel_config("use_ubatching"),
    ),
    Setting("kv_transfer_config", _CONNECTOR, (None,)),
    Setting("kv_offloading_size", _CONNECTOR, (None,)),
    Setting(
        "cpu_offload_gb", "nobody has tested draft passes with weights in the host's memory", (0,)
    ),
    Setting(
        "offload_group_size",
        "weights are prefetched in the order of a whole forward, and a draft pass ends early",
        (0,),
    ),
    Setting(
        "model_class_overrides",
        "LayerSkip sets the model class of this engine itself",
        ({},),
    ),
    Setting(
        "kv_sharing_fast_prefill",
        "it skips layers of a prefill whose K/V the drafts would read",
        (False,),
    ),
    Setting(
        "enable_batch_sharded_sampling",
        "ranks would gather rows of log probabilities that are narrower than the verify steps'",
        (None, False),
    ),
    Setting(
        "compilation_config.mode",
        "the early and the late stage are compiled by vLLM's own modes, not as one model",
        (None, "NONE", "DYNAMO_TRACE_ONCE", "VLLM_COMPILE"),
        lambda engine_args, parallel_config: _name_of(engine_args.compilation_config.mode),
    ),
)


def check_engine(engine_args: Any, parallel_config: Any) -> None:
    """Refuse an engine setting that LayerSkip cannot serve.

    Raises:
        ValueError: names the setting, its value, the valid ones and what to do.
    """
    for setting in REFUSED:
        value = setting.value(engine_args, parallel_config)
        if value not in setting.only:
            raise ValueError(
                f"LayerSkip does not support {setting.name}={value!r}: {setting.why}; "
                f"{_valid(setting.only)}. {_ELSE}"
            )
    _check_scheduler(engine_args.scheduler_cls)


def check_request(options: LayerSkipOptions, reuse_was_asked_for: bool, engine_args: Any) -> None:
    """Refuse an option of LayerSkip that an engine setting rules out.

    Raises:
        ValueError: names both, and what to do.
    """
    if engine_args.enable_lora:
        for option, given, remedy in (
            ("draft_vocab", options.draft_vocab is not None, "'none'"),
            (
                "use_local_argmax_reduction",
                bool(options.vllm_options.get("use_local_argmax_reduction")),
                "false",
            ),
        ):
            if given:
                raise ValueError(
                    f"speculative_config: {option} cannot go with enable_lora=True: an adapter "
                    f"may change the LM head, which drafts then compute in full. Set {option} to "
                    f"{remedy}, or leave LoRA out."
                )
    for name in settings_without_reuse(engine_args):
        if reuse_was_asked_for:
            raise ValueError(
                f"speculative_config: reuse_exit_states=True cannot go with {name}=True: "
                "verification then runs every layer. Leave reuse_exit_states out, or set it to "
                f"false, or leave {name} out."
            )


def check_twin(options: LayerSkipOptions, model_config: Any, engine_args: Any) -> None:
    """Refuse a draft twin where an engine setting or the checkpoint rules it out.

    Raises:
        ValueError: names both, and what to do.
    """
    if not options.has_twin:
        return
    option = (
        f"draft_quantization={options.draft_quantization!r}"
        if options.draft_quantization != NONE
        else f"draft_adapter={options.draft_adapter and options.draft_adapter.path!r}"
    )
    if engine_args.enable_lora:
        raise ValueError(
            f"speculative_config: {option} cannot go with enable_lora=True: vLLM adds adapters to "
            "the target's layers, and drafts of other weights would be accepted less with each of "
            "them. Set draft_quantization and draft_adapter to 'none', or leave LoRA out."
        )
    _check_bits(options, option, model_config)


def _check_bits(options: LayerSkipOptions, option: str, model_config: Any) -> None:
    """Refuse a twin of a quantised target, unless it has fewer bits and no adapter."""
    if model_config.quantization is None:
        return
    if options.draft_adapter is not None:
        why = "an adapter is merged into weights of full width"
    else:
        bits = _bits_of_target(model_config)
        kind = KINDS[options.draft_quantization]
        if bits is not None and kind.bits < bits:
            return
        many = "an unknown number of bits" if bits is None else f"{bits} bits"
        why = f"it has {many}, and {kind.bits} bits would not be fewer"
    raise ValueError(
        f"speculative_config: {option} cannot go with this quantised target (quantization="
        f"{model_config.quantization!r}): {why}. Set {option.partition('=')[0]} to 'none', or "
        "serve the original checkpoint."
    )


def _bits_of_target(model_config: Any) -> int | None:
    """Bits of a quantised checkpoint's linear weights; None if its config does not say."""
    if "fp8" in model_config.quantization or "int8" in model_config.quantization:
        return 8
    config = getattr(model_config.hf_config, "quantization_config", None) or {}
    groups = config.get("config_groups") or {}
    weights = [(group or {}).get("weights") or {} for group in groups.values()]
    named = (config.get("bits"), config.get("w_bit"), *(w.get("num_bits") for w in weights))
    return min((bits for bits in named if isinstance(bits, int)), default=None)


def settings_without_reuse(engine_args: Any) -> tuple[str, ...]:
    """The settings in use under which a verify step does not start from exit states."""
    return tuple(
        name for name in ("enable_lora", "enable_prompt_embeds") if getattr(engine_args, name)
    )


def _check_scheduler(scheduler_cls: Any) -> None:
    if scheduler_cls is None:
        return
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.scheduler import Scheduler

    found = (
        resolve_obj_by_qualname(scheduler_cls) if isinstance(scheduler_cls, str) else scheduler_cls
    )
    if not (isinstance(found, type) and issubclass(found, Scheduler)):
        raise ValueError(
            f"LayerSkip does not support scheduler_cls={scheduler_cls!r}: drafts need the "
            "lookahead slots that vLLM's scheduler reserves. Derive the class from "
            "vllm.v1.core.sched.async_scheduler.AsyncScheduler, or leave scheduler_cls out."
        )


def _name_of(mode: Any) -> str | None:
    return getattr(mode, "name", mode)


def _valid(values: tuple[Any, ...]) -> str:
    if len(values) == 1:
        return f"the only valid value is {values[0]!r}"
    return f"valid values are {', '.join(map(repr, values))}"
