# SPDX-License-Identifier: Apache-2.0
"""Catch a wait for a GPU that is not there."""

from __future__ import annotations

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.measuring import hardware


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "gpu_info", lambda: None)
    monkeypatch.setattr(hardware.Path, "glob", lambda *_: iter(()))
    with pytest.raises(UserError, match="--device cuda: this machine has no GPU"):
        hardware.check_device("cuda")
    hardware.check_device("cpu")
    hardware.check_device(None)


def test_a_gpu_without_nvidia_smi_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "gpu_info", lambda: None)
    monkeypatch.setattr(hardware.Path, "glob", lambda *_: iter([tmp_path / "nvidia0"]))
    hardware.check_device("cuda")
