# SPDX-License-Identifier: Apache-2.0
"""Catch an engine setting that would break drafts and is not refused, and a page of features
that does not say so: real ``VllmConfig``s are built, no engine is started."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_layerskip.config.admission import REFUSED, Setting, check_twin

REQUEST = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3}
FEATURES = Path(__file__).parents[3] / "docs" / "features.md"

# One use of every refused setting, and the value that the message must show.
USES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "pipeline_parallel_size": [({"pipeline_parallel_size": 2}, "2")],
    "decode_context_parallel_size": [
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "2")
    ],
    "prefill_context_parallel_size": [({"prefill_context_parallel_size": 2}, "2")],
    "use_ubatching (enable_dbo, ubatch_size)": [
        ({"enable_dbo": True}, "True"),
        ({"ubatch_size": 2}, "True"),
    ],
    "kv_transfer_config": [("kv_transfer", "KVTransferConfig(")],
    "kv_offloading_size": [({"kv_offloading_size": 0.5}, "0.5")],
    "cpu_offload_gb": [({"cpu_offload_gb": 1}, "1")],
    "offload_group_size": [({"offload_group_size": 4}, "4")],
    "model_class_overrides": [
        # By then vLLM has registered the class for the whole process.
        (
            {"model_class_overrides": {"OtherForCausalLM": "some.module:Class"}},
            "{'OtherForCausalLM': 'some.module:Class'}",
        )
    ],
    "kv_sharing_fast_prefill": [({"kv_sharing_fast_prefill": True}, "True")],
    "enable_batch_sharded_sampling": [
        ({"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2}, "True")
    ],
    "compilation_config.mode": [
        ({"compilation_config": {"mode": 1}}, "'STOCK_TORCH_COMPILE'"),
    ],
}


def uses() -> list[Any]:
    return [
        pytest.param(name, settings, value, id=f"{name}={value}")
        for name, cases in USES.items()
        for settings, value in cases
    ]


@pytest.mark.parametrize(("name", "settings", "value"), uses())
def test_a_refused_setting_is_named_with_its_value_and_the_valid_ones(
    engine_config, name, settings, value
):
    if settings == "kv_transfer":
        from vllm.config import KVTransferConfig

        connector = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
        settings = {"kv_transfer_config": connector}
    with pytest.raises(ValueError, match="LayerSkip does not support") as error:
        engine_config(dict(REQUEST), **settings)
    assert f"{name}={value}" in str(error.value)
    assert re.search(r"(the only valid value is|valid values are) ", str(error.value))
    assert "Change it" in str(error.value)


def test_every_refused_setting_has_a_use_here_and_a_row_in_the_features_page():
    names = [setting.name for setting in REFUSED]
    assert len(set(names)) == len(names)
    assert set(USES) == set(names)
    rows = [line for line in FEATURES.read_text().splitlines() if line.startswith("|")]
    for name in names:
        cells = [row.split("|") for row in rows if f"`{name}`" in row.split("|")[1]]
        assert len(cells) == 1, f"docs/features.md has {len(cells)} rows for {name}"
        assert "refused" in cells[0][2]


@pytest.mark.parametrize("setting", REFUSED, ids=lambda setting: setting.name)
def test_vllms_default_is_valid(engine_args, setting: Setting):
    """A refusal must never hit somebody who left a setting alone."""
    args = engine_args(dict(REQUEST))
    parallel_config = args.create_engine_config().parallel_config
    assert setting.value(args, parallel_config) in setting.only


def test_the_tests_that_the_features_page_names_exist():
    tests = FEATURES.parents[1] / "tests"
    named = re.findall(
        r"`((?:unit|engine)/(?:\w+/)*test_\w+)(?:::(test_\w+))?`", FEATURES.read_text()
    )
    assert len(named) > 20
    for file, function in named:
        path = tests / f"{file}.py"
        assert path.is_file(), file
        assert not function or f"def {function}(" in path.read_text(), f"{file}::{function}"


class OtherScheduler:
    """No scheduler of vLLM's."""


@pytest.mark.parametrize(
    "scheduler", [OtherScheduler, f"{__name__}.OtherScheduler"], ids=["class", "name"]
)
def test_a_scheduler_that_is_not_vllms_is_refused(engine_config, scheduler):
    with pytest.raises(ValueError, match="scheduler_cls=.*lookahead slots.*AsyncScheduler"):
        engine_config(dict(REQUEST), scheduler_cls=scheduler)


@pytest.mark.parametrize("name", ["scheduler.Scheduler", "async_scheduler.AsyncScheduler"])
def test_a_scheduler_derived_from_vllms_is_taken(engine_config, name):
    scheduler = f"vllm.v1.core.sched.{name}"
    config = engine_config(dict(REQUEST), scheduler_cls=scheduler)
    assert config.scheduler_config.scheduler_cls == scheduler


def test_lora_rules_out_a_twin(engine_config):
    with pytest.raises(
        ValueError, match="draft_quantization='int4' cannot go with enable_lora"
    ) as e:
        engine_config(REQUEST | {"draft_quantization": "int4"}, enable_lora=True)
    assert "Set draft_quantization and draft_adapter to 'none'" in str(e.value)


@pytest.mark.parametrize(
    ("quantization", "config", "kind", "says"),
    [
        ("fp8", {"quant_method": "fp8"}, "int4", None),
        ("fp8", {"quant_method": "fp8"}, "fp8", "it has 8 bits, and 8 bits would not be fewer"),
        ("gptq", {"bits": 8}, "int4", None),
        ("gptq_marlin", {"bits": 4}, "int4", "it has 4 bits, and 4 bits would not"),
        ("awq", {"w_bit": 4}, "int8", "it has 4 bits, and 8 bits would not"),
        ("compressed-tensors", {"config_groups": {1: {"weights": {"num_bits": 8}}}}, "int4", None),
        ("compressed-tensors", {"config_groups": {1: {"weights": None}}}, "int4", "unknown"),
        ("bitsandbytes", None, "int4", "it has an unknown number of bits"),
        (None, None, "int8", None),
    ],
)  # fmt: skip
def test_a_quantised_target_may_have_a_twin_of_fewer_bits(quantization, config, kind, says):
    options = SimpleNamespace(has_twin=True, draft_quantization=kind, draft_adapter=None)
    model_config = SimpleNamespace(
        quantization=quantization, hf_config=SimpleNamespace(quantization_config=config)
    )
    arguments = options, model_config, SimpleNamespace(enable_lora=False)
    if says is None:
        check_twin(*arguments)
        options.draft_adapter = SimpleNamespace(path="a")
        says = "an adapter is merged into weights of full width"
        if quantization is None:
            return
    with pytest.raises(ValueError, match="cannot go with this quantised target") as error:
        check_twin(*arguments)
    assert says in str(error.value)


@pytest.mark.parametrize("setting", ["enable_lora", "enable_prompt_embeds"])
def test_exit_states_are_not_reused_where_verification_needs_every_layer(engine_config, setting):
    config = engine_config(dict(REQUEST), **{setting: True})
    assert config.speculative_config.reuse_exit_states is False
    with pytest.raises(ValueError, match=rf"reuse_exit_states=True cannot go with {setting}=True"):
        engine_config(REQUEST | {"reuse_exit_states": True}, **{setting: True})


@pytest.mark.parametrize("option", ["draft_vocab", "use_local_argmax_reduction"])
def test_options_that_lora_rules_out(engine_config, tmp_path, option):
    (tmp_path / "ids").write_text("[1, 2, 3]")
    value = str(tmp_path / "ids") if option == "draft_vocab" else True
    with pytest.raises(ValueError, match=rf"{option} cannot go with enable_lora=True") as error:
        engine_config(REQUEST | {option: value}, enable_lora=True)
    assert f"Set {option} to" in str(error.value)
    assert engine_config(REQUEST | {option: value}).speculative_config.exit_layer == 2


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("draft_tensor_parallel_size", "cannot be used with LayerSkip"),
        ("quantization", "cannot be used with LayerSkip"),
        ("max_model_len", "cannot be used with LayerSkip"),
    ],
)
def test_options_of_a_draft_model_are_refused(engine_config, option, words):
    with pytest.raises(ValueError, match=words):
        engine_config(REQUEST | {option: 1})


def test_watermarking_is_refused_by_vllm(engine_config):
    request = REQUEST | {"draft_sample_method": "probabilistic"}
    with pytest.raises(ValueError, match="Watermarking supports only"):
        engine_config(request, watermark_config={"algorithm": "gumbel", "key": 1})
