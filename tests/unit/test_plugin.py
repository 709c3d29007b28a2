# SPDX-License-Identifier: Apache-2.0
"""Catch a plugin that breaks vLLM for engines that never asked for LayerSkip: on import, on
registration (even against a vLLM with pieces missing) and on a plain speculative request."""

import importlib
import inspect
import subprocess
import sys

import pytest

from vllm_layerskip import plugin
from vllm_layerskip.host import check, version

FREE_OF_VLLM = (
    "vllm_layerskip",
    "vllm_layerskip.commands.main",
    "vllm_layerskip.config.cli_args",
    "vllm_layerskip.config.draft_vocab",
    "vllm_layerskip.config.early_exit",
    "vllm_layerskip.host",
    "vllm_layerskip.metrics.prometheus",
    "vllm_layerskip.models",
    "vllm_layerskip.config.options",
    "vllm_layerskip.plugin",
    "vllm_layerskip.metrics.step_counts",
    "vllm_layerskip.training.recipe",
    "vllm_layerskip.cpu.triton_interpreter",
)
WRAPPED = (
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args",
    "vllm.v1.worker.gpu.spec_decode:init_speculator",
    "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


def _owner(path):
    """``(object, attribute name)`` of a contact path."""
    module, _, attributes = path.partition(":")
    *owners, name = attributes.split(".")
    owner = importlib.import_module(module)
    for attribute in owners:
        owner = getattr(owner, attribute)
    return owner, name


@pytest.fixture
def unregistered(monkeypatch):
    """vLLM as it was before ``register()``; undone after the test."""
    for path in WRAPPED:
        owner, name = _owner(path)
        static = inspect.getattr_static(owner, name)
        original = inspect.unwrap(check.resolve(path))
        kind = type(static) if isinstance(static, staticmethod | classmethod) else lambda f: f
        monkeypatch.setattr(owner, name, kind(original))
    return monkeypatch


def _is_wrapped(path):
    return check.resolve(path) is not inspect.unwrap(check.resolve(path))


def test_the_plugin_and_all_that_it_imports_load_neither_vllm_nor_torch():
    heavy = ("vllm", "torch", "triton", "transformers")
    code = (
        f"import importlib, sys\nfor name in {FREE_OF_VLLM}:\n    importlib.import_module(name)\n"
        f"    assert not [m for m in {heavy} if m in sys.modules], name"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_register_wraps_every_piece_of_vllm_exactly_once(unregistered):
    assert not any(map(_is_wrapped, WRAPPED))
    plugin.register()
    first = [check.resolve(path) for path in WRAPPED]
    assert all(map(_is_wrapped, WRAPPED))
    assert not any(hasattr(wrapper.__wrapped__, "__wrapped__") for wrapper in first)
    plugin.register()
    assert [check.resolve(path) for path in WRAPPED] == first


def _without(*path_and_names):
    def remove(monkeypatch):
        for path, name in path_and_names:
            owner, attribute = _owner(f"{path}{name}")
            monkeypatch.delattr(owner, attribute)

    return remove


def _wrap_fails(monkeypatch):
    def wrap(*_):
        raise RuntimeError("cannot wrap")

    monkeypatch.setattr(plugin, "wrap", wrap)
    monkeypatch.setattr("vllm_layerskip.host.wrap.wrap", wrap)


def _no_module(name):
    return lambda monkeypatch: monkeypatch.setitem(sys.modules, name, None)


# What is missing, and which of WRAPPED are nevertheless in place afterwards.
MISSING = {
    "EngineArgs.from_cli_args": (
        _without(("vllm.engine.arg_utils:EngineArgs", ".from_cli_args")),
        (WRAPPED[0], WRAPPED[1], *WRAPPED[3:]),
    ),
    "EngineArgs": (_without(("vllm.engine.arg_utils:", "EngineArgs")), WRAPPED[3:]),
    "vllm.engine.arg_utils": (_no_module("vllm.engine.arg_utils"), WRAPPED[3:]),
    "init_speculator": (
        _without(("vllm.v1.worker.gpu.spec_decode:", "init_speculator")),
        (*WRAPPED[:3], WRAPPED[4]),
    ),
    "the spec_decode package": (
        _no_module("vllm.v1.worker.gpu.spec_decode"),
        (*WRAPPED[:3], WRAPPED[4]),
    ),
    "SchedulerConfig.get_scheduler_cls": (
        _without(("vllm.config.scheduler:SchedulerConfig", ".get_scheduler_cls")),
        WRAPPED[:4],
    ),
    "ModelRegistry": (
        _without(("vllm.model_executor.models.registry:", "ModelRegistry")),
        WRAPPED,
    ),
    "whatever wrap needs": (_wrap_fails, ()),
}


@pytest.mark.parametrize("missing", MISSING)
def test_register_warns_and_goes_on_when_a_piece_of_vllm_is_missing(
    unregistered, layerskip_log, missing
):
    remove, in_place = MISSING[missing]
    with unregistered.context() as patch:
        remove(patch)
        plugin.register()
    # What `remove` took away stands again, but register() had to do without it.
    assert {path for path in WRAPPED if _is_wrapped(path)} == set(in_place)
    warnings = [record for record in layerskip_log.records if record.levelname == "WARNING"]
    assert warnings
    assert all(record.exc_info for record in warnings)
    for record in warnings:
        assert version.vllm_version() in record.getMessage()
        assert "LayerSkip is not available" in record.getMessage()


def test_register_is_silent_when_nothing_is_missing(unregistered, layerskip_log):
    plugin.register()
    assert layerskip_log.records == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"speculative_config": {}},
        {"speculative_config": NGRAM},
        {"speculative_config": {"model": "org/draft", "num-speculative-tokens": 2}},
        {"spec_method": "ngram", "spec_tokens": 3},
    ],
    ids=repr,
)
def test_vllms_own_function_gets_a_plain_request_untouched(unregistered, engine_args, settings):
    from vllm.engine.arg_utils import EngineArgs

    calls, result = [], object()

    def create_speculative_config(self, target_model_config, target_parallel_config):
        seen = {name: getattr(self, name) for name in settings}
        calls.append((self, seen, target_model_config, target_parallel_config))
        return result

    unregistered.setattr(EngineArgs, "create_speculative_config", create_speculative_config)
    plugin.register()
    assert _is_wrapped(WRAPPED[0])
    args, model_config, parallel_config = engine_args(**settings), object(), object()
    assert args.create_speculative_config(model_config, parallel_config) is result
    assert calls == [(args, settings, model_config, parallel_config)]


def test_plain_engines_keep_vllms_own_config(engine_config):
    from vllm.config.speculative import SpeculativeConfig

    assert engine_config().speculative_config is None
    for config in (
        engine_config(dict(NGRAM)).speculative_config,
        engine_config(spec_method="ngram", spec_tokens=3).speculative_config,
    ):
        assert type(config) is SpeculativeConfig
        assert (config.method, config.num_speculative_tokens) == ("ngram", 3)


@pytest.mark.parametrize(
    ("speculative_config", "flags"),
    [
        ({"method": "layerskip"}, {"spec_method": "layerskip"}),
        ({"model": "[self]"}, {"spec_model": "[self]"}),
        ({"method": "layerskip", "num-speculative-tokens": 3}, {"spec_tokens": 5}),
    ],
    ids=repr,
)
def test_a_key_given_as_flag_and_in_the_config_is_an_error(
    engine_config, speculative_config, flags
):
    (flag,) = flags
    with pytest.raises(ValueError, match="mutually exclusive") as error:
        engine_config(speculative_config, **flags)
    assert f"--{flag.replace('_', '-')} " in str(error.value)


def test_the_runner_of_a_plain_engine_gets_vllms_own_speculator(unregistered, engine_config):
    spec_decode = importlib.import_module("vllm.v1.worker.gpu.spec_decode")
    calls, speculator = [], object()

    def init_speculator(vllm_config, device, req_states):
        calls.append((vllm_config, device, req_states))
        return speculator

    unregistered.setattr(spec_decode, "init_speculator", init_speculator)
    plugin.register()
    assert _is_wrapped(WRAPPED[3])
    config, device, req_states = engine_config(dict(NGRAM)), object(), object()
    assert spec_decode.init_speculator(config, device, req_states) is speculator
    assert calls == [(config, device, req_states)]


def test_registering_imports_neither_scheduler_nor_metrics():
    """Both take seconds, and ``vllm --help`` registers too."""
    code = (
        "import sys, vllm.engine.arg_utils\n"
        "before = set(sys.modules)\n"
        "from vllm_layerskip.plugin import register\n"
        "register()\n"
        "added = set(sys.modules) - before\n"
        "slow = ('vllm.v1.core.sched.scheduler', 'vllm.v1.metrics.loggers')\n"
        "assert not [name for name in slow if name in added]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
