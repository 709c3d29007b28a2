# SPDX-License-Identifier: Apache-2.0
"""Catch minutes that are spent before vLLM says that it has no kernel for a twin."""

from __future__ import annotations

from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.errors import UserError
from vllm_layerskip.tuning.check_kernels import check_kernels
from vllm_layerskip.tuning.drafts import OWN, Draft
from vllm_layerskip.tuning.jobs import EngineSettings
from vllm_layerskip.worker import twin_methods

MODEL = str(Path(vllm_layerskip.__file__).parent / "checkpoint")
ENGINE = EngineSettings(MODEL, dtype="float32", device="cpu", max_model_len=128)


def test_the_targets_own_layers_need_no_kernel(monkeypatch):
    monkeypatch.setattr(twin_methods, "kinds_that_work", lambda dtype: pytest.fail("asked"))
    check_kernels(ENGINE, [OWN, Draft(adapter="abc")])


def test_in_float32_every_kind_has_its_reference():
    check_kernels(ENGINE, [OWN, Draft("int4"), Draft("int8"), Draft("fp8")])


def test_a_kind_without_a_kernel_is_named_with_those_that_work(monkeypatch):
    monkeypatch.setattr(twin_methods, "kinds_that_work", lambda dtype: ["int4", "int8"])
    check_kernels(ENGINE, [Draft("int4")])
    with pytest.raises(UserError) as caught:
        check_kernels(ENGINE, [OWN, Draft("int4"), Draft("fp8", "abc")])
    assert str(caught.value) == (
        "--draft-quantization fp8: vLLM has no kernel for it on this machine with dtype float32. "
        "Kinds that work here: int4, int8. Leave the others out."
    )
