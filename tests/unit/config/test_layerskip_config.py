# SPDX-License-Identifier: Apache-2.0
"""Catch an engine config that LayerSkip cannot run on, or that leaks into other engines: real
``VllmConfig``s are built, no engine is started."""

import copy
import pickle
from types import SimpleNamespace

import pytest

from vllm_layerskip.host import version

REQUEST = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
OURS, VLLMS = "LayerSkipLlamaForCausalLM", "LlamaForCausalLM"


@pytest.fixture
def config(engine_config):
    return engine_config(dict(REQUEST))


def test_the_request_becomes_a_layerskip_config(config):
    from vllm_layerskip.config.layerskip_config import LayerSkipConfig

    ours = config.speculative_config
    assert type(ours) is LayerSkipConfig
    assert (ours.exit_layer, ours.num_speculative_tokens, ours.reuse_exit_states) == (2, 3, True)


@pytest.mark.parametrize("num_speculative_tokens", [1, 3, 7])
def test_vllm_reserves_a_slot_per_draft_and_no_other(engine_config, num_speculative_tokens):
    request = REQUEST | {"num_speculative_tokens": num_speculative_tokens}
    config = engine_config(request, max_num_batched_tokens=256)
    assert config.speculative_config.method == "draft_model"
    assert config.num_lookahead_tokens == num_speculative_tokens
    assert config.speculative_config.max_num_new_slots_for_drafting == 0
    # A draft model of its own would take a slot per request away from the batch.
    assert config.scheduler_config.max_num_scheduled_tokens == 256


def test_the_draft_is_the_target_itself(config):
    ours = config.speculative_config
    assert ours.draft_model_config is ours.target_model_config is config.model_config
    assert ours.draft_parallel_config is config.parallel_config
    assert ours.model == config.model_config.model


def test_only_the_layerskip_engine_loads_our_model_class(engine_config):
    assert engine_config().model_config.architecture == VLLMS
    first = engine_config(dict(REQUEST)).model_config
    assert (first.architecture, first.architectures) == (OURS, [OURS])
    plain = engine_config().model_config
    assert (plain.architecture, plain.architectures) == (VLLMS, [VLLMS])
    assert engine_config(dict(REQUEST)).model_config.architecture == OURS


def test_the_same_engine_args_can_be_used_again(engine_args):
    for args in (
        engine_args(dict(REQUEST)),
        engine_args(
            {"exit_layer": 2, "reuse-exit-states": False}, spec_model="[self]", spec_tokens=3
        ),
    ):
        configs = [args.create_engine_config().speculative_config for _ in range(2)]
        assert repr(configs[0]) == repr(configs[1])
        assert configs[0].exit_layer == 2


def test_the_config_reaches_another_process_whole(config):
    sent = pickle.loads(pickle.dumps(config))
    ours = sent.speculative_config
    assert type(ours) is type(config.speculative_config)
    assert (ours.exit_layer, ours.num_speculative_tokens, ours.reuse_exit_states) == (2, 3, True)
    assert ours.target_model_config is sent.model_config
    assert sent.model_config.architecture == OURS
    assert sent.num_lookahead_tokens == 3
    assert ours.max_num_new_slots_for_drafting == 0
    assert sent.compute_hash() == config.compute_hash()


def test_what_is_compiled_for_one_setting_is_not_used_for_another(engine_config):
    requests = [
        REQUEST,
        REQUEST | {"exit_layer": 1},
        REQUEST | {"num_speculative_tokens": 2},
        REQUEST | {"draft_quantization": "int4"},
        REQUEST | {"draft_quantization": "int8"},
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
        None,
    ]
    configs = [engine_config(request and dict(request)) for request in requests]
    assert len({config.compute_hash() for config in configs}) == len(requests)
    ours = [config.speculative_config.compute_hash() for config in configs[:5]]
    assert len(set(ours)) == 5
    assert engine_config(dict(REQUEST)).speculative_config.compute_hash() == ours[0]
    config = copy.copy(configs[0].speculative_config)
    for digest in ("aa", "bb"):
        config.draft_adapter = SimpleNamespace(digest=digest)
        assert config.compute_hash() not in ours
        ours.append(config.compute_hash())


def test_a_twin_reuses_nothing_and_says_what_it_is(engine_config):
    config = engine_config(REQUEST | {"draft_quantization": "int4"}).speculative_config
    assert config.has_twin
    assert not config.reuse_exit_states
    assert "draft_quantization='int4'" in repr(config)
    assert not engine_config(dict(REQUEST)).speculative_config.has_twin
    sent = pickle.loads(pickle.dumps(config))
    assert sent.draft_quantization == "int4"


@pytest.mark.parametrize("value", ["all", 4])
def test_all_layers_draft(engine_config, value):
    request = REQUEST | {"exit_layer": value, "draft_quantization": "int8"}
    assert engine_config(request).speculative_config.exit_layer == 4


def test_what_runs_around_the_stages_compiles_nothing_anew(engine_config, tmp_path):
    (tmp_path / "ids").write_text("1\n2\n")
    expected = engine_config(dict(REQUEST)).compute_hash()
    for other in ({"reuse_exit_states": False}, {"draft_vocab": str(tmp_path / "ids")}):
        assert engine_config(REQUEST | other).compute_hash() == expected


@pytest.mark.parametrize("value", ["", "no", "2"])
def test_a_variable_of_another_value_ends_the_start(engine_config, monkeypatch, value):
    monkeypatch.setenv("LAYERSKIP_DRAFT_GRAPHS", value)
    with pytest.raises(ValueError, match="LAYERSKIP_DRAFT_GRAPHS=.* must be 1 or 0"):
        engine_config(dict(REQUEST))
    assert engine_config().speculative_config is None


def test_the_engine_runs_on_model_runner_v2(config):
    assert config.use_v2_model_runner


def test_async_scheduling_is_left_alone(engine_config):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="async scheduling is only supported"):
        engine_config(ngram, async_scheduling=True)
    for setting in (None, True, False):
        plain = engine_config(async_scheduling=setting)
        ours = engine_config(dict(REQUEST), async_scheduling=setting)
        assert ours.scheduler_config.async_scheduling == plain.scheduler_config.async_scheduling


def test_prefix_caching_is_left_alone(engine_config):
    for setting in (True, False):
        ours = engine_config(dict(REQUEST), enable_prefix_caching=setting)
        assert ours.cache_config.enable_prefix_caching is setting


def test_a_users_worker_extension_is_left_alone(engine_config):
    for own in ("", "a_package.Extension"):
        config = engine_config(dict(REQUEST), worker_extension_cls=own)
        assert config.parallel_config.worker_extension_cls == own


def test_auto_reads_the_checkpoints_block(engine_config):
    block = {"layerskip": {"exit_layer": 3, "num_speculative_tokens": 4}}
    ours = engine_config({"model": "[self]"}, hf_overrides=block).speculative_config
    assert (ours.exit_layer, ours.num_speculative_tokens) == (3, 4)


def test_the_last_layer_is_no_exit_of_this_checkpoint(engine_config):
    with pytest.raises(ValueError, match=r"exit_layer=4 must be an integer from 1 to 3 "):
        engine_config(REQUEST | {"exit_layer": 4})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"draft_sample_method": "probabilistic"}, "probabilistic"),
        ({"rejection_sample_method": "block"}, "block"),
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 3], [5, 8, 1]]}, [(1, 4, 3), (5, 8, 1)]),
        (
            {
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": [0.5, 0.25, 0.125],
            },
            "synthetic",
        ),
    ],
    ids=repr,
)
def test_vllms_own_options_keep_their_effect(engine_config, options, expected):
    name = next(iter(options))
    assert getattr(engine_config(REQUEST | options).speculative_config, name) == expected


def test_vllms_own_checks_still_run(engine_config):
    with pytest.raises(ValueError, match="rejection_sample_method"):
        engine_config(REQUEST | {"rejection_sample_method": "guess"})


# What LayerSkip refuses of a model, and what the error must say (settings: test_admission.py).
REFUSED = [
    ({"runner": "pooling"}, ("runner='pooling'", "runner='generate'")),
]


@pytest.mark.parametrize(("settings", "says"), REFUSED, ids=lambda value: repr(value)[:60])
def test_an_engine_setting_that_layerskip_cannot_serve_is_refused(engine_config, settings, says):
    with pytest.raises(ValueError, match="LayerSkip") as error:
        engine_config(dict(REQUEST), **settings)
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize("value", ["0", " 0 "])
def test_model_runner_v1_is_refused(engine_config, monkeypatch, value):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
    with pytest.raises(ValueError, match="Model Runner V2") as error:
        engine_config(dict(REQUEST))
    assert f"VLLM_USE_V2_MODEL_RUNNER={value!r}" in str(error.value)
    assert "Unset it" in str(error.value)


@pytest.mark.parametrize("value", [None, "0"])
def test_a_cpu_without_tritons_interpreter_is_refused(engine_config, monkeypatch, value):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a GPU compiles its kernels")
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 before Python starts") as error:
        engine_config(dict(REQUEST))
    assert repr(value) in str(error.value)
    assert "pip install" in str(error.value)


def test_an_unsupported_vllm_is_refused_with_the_range(engine_config, monkeypatch):
    monkeypatch.setattr(version, "vllm_version", lambda: "0.34.0")
    with pytest.raises(RuntimeError, match=r"vLLM >=0\.32,<0\.34, but vLLM 0\.34\.0 is installed"):
        engine_config(dict(REQUEST))
    # Nobody else is bothered by it.
    assert engine_config().speculative_config is None
