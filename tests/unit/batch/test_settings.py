# SPDX-License-Identifier: Apache-2.0
"""Catch an option that does not reach the engine, and two options that contradict each other."""

from __future__ import annotations

import pytest

from vllm_layerskip.batch.settings import EngineSettings, job_settings
from vllm_layerskip.errors import UserError


def _settings(**engine):
    return job_settings(EngineSettings("m", **engine), {"top_k": 3}, [])


def test_options_reach_the_engine_and_further_arguments_win():
    settings = _settings(
        exit_layer=8,
        num_speculative_tokens=3,
        max_model_len=64,
        tensor_parallel_size=2,
        engine_args={"max_model_len": 32},
    )
    assert settings.speculative_config == {
        "method": "layerskip",
        "exit_layer": 8,
        "num_speculative_tokens": 3,
    }
    assert settings.engine_args == {
        "dtype": "auto",
        "max_model_len": 32,
        "tensor_parallel_size": 2,
    }
    assert settings.sampling_params["top_k"] == 3


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [(None, "cpu", "float32"), (None, "cuda", "auto"), ("bfloat16", "cpu", "bfloat16")],
)
def test_the_dtype_of_a_cpu_is_float32_unless_it_is_given(dtype, device, expected):
    assert _settings(dtype=dtype, device=device).engine_args["dtype"] == expected


def test_plain_vllm_has_no_speculative_config():
    assert _settings(speculation=False).speculative_config is None
    with pytest.raises(UserError, match="excludes --exit-layer 3, --num-speculative-tokens 2"):
        _settings(speculation=False, exit_layer=3, num_speculative_tokens=2)


@pytest.mark.parametrize("name", ["id", "messages", "sampling_params"])
def test_a_column_with_a_meaning_of_its_own_is_not_that_of_texts(name):
    with pytest.raises(UserError, match=f"--text-field {name}: .* meaning of their own"):
        job_settings(EngineSettings("m"), {}, [], name)
