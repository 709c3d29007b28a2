# SPDX-License-Identifier: Apache-2.0
"""Catch a Triton backend that appears where it must not, or not where it must: vLLM on a CPU
would run kernels that cannot be compiled, or refuse LayerSkip."""

import json
import os
import subprocess
import sys

import pytest

from vllm_layerskip.cpu import triton_interpreter

_REPORT = """
import json
from vllm.triton_utils import HAS_TRITON
from vllm.platforms import current_platform
from triton.backends import backends
from vllm_layerskip.cpu import triton_interpreter
before = dict(backends)
triton_interpreter.register()
print(json.dumps({
    "has_triton": HAS_TRITON,
    "cpu_backend": "cpu" in before,
    "is_cpu": current_platform.is_cpu(),
    "unchanged": before == backends,
}))
"""


@pytest.fixture
def cpu_build():
    from vllm.platforms import vllm_version_matches_substr

    if not vllm_version_matches_substr("cpu"):
        pytest.skip("a CPU build of vLLM is what this is about")


@pytest.mark.parametrize("value", [None, "1"], ids=["unset", "set to 1"])
def test_vllm_has_triton_on_a_cpu_exactly_in_interpret_mode(cpu_build, value):
    env = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    if value is not None:
        env["TRITON_INTERPRET"] = value
    run = subprocess.run(
        [sys.executable, "-c", _REPORT], env=env, check=True, capture_output=True, timeout=120
    )
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "has_triton": value is not None,
        "cpu_backend": value is not None,
        "is_cpu": True,
        # Loading the plugin a second time adds nothing.
        "unchanged": True,
    }


@pytest.mark.parametrize(
    "value", ["0", "1", "true", "True", "on", "ON", "yes", "y", "", "no", "off", "false", "2", "t"]
)
def test_interpret_mode_is_what_triton_makes_of_the_variable(monkeypatch, value):
    from triton import knobs

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton_interpreter.interpret_mode() is knobs.runtime.interpret


def test_interpret_mode_is_off_when_the_variable_is_unset(monkeypatch):
    from triton import knobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_interpreter.interpret_mode() is knobs.runtime.interpret is False


@pytest.fixture
def backends(monkeypatch):
    """Triton's table without a CPU backend, in interpret mode; undone after the test."""
    from triton.backends import backends

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(backends, "cpu", raising=False)
    yield backends
    backends.pop("cpu", None)  # Before monkeypatch puts the table back.


def test_the_backend_is_active_for_as_long_as_interpret_mode_is(cpu_build, monkeypatch, backends):
    triton_interpreter.register()
    assert backends["cpu"].driver.is_active()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not backends["cpu"].driver.is_active()


def test_a_real_cpu_backend_is_not_replaced(monkeypatch, backends):
    real = object()
    monkeypatch.setitem(backends, "cpu", real)
    triton_interpreter.register()
    assert backends["cpu"] is real


def test_no_backend_is_added_outside_of_interpret_mode(monkeypatch, backends):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    triton_interpreter.register()
    assert "cpu" not in backends


def test_no_backend_is_added_to_a_gpu_build_of_vllm(monkeypatch, backends):
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms, "vllm_version_matches_substr", lambda text: False)
    triton_interpreter.register()
    assert "cpu" not in backends


def test_a_triton_without_the_classes_that_we_need_costs_a_warning(
    cpu_build, monkeypatch, backends, layerskip_log
):
    monkeypatch.setitem(sys.modules, "triton.backends.driver", None)
    assert triton_interpreter.register() is None
    assert "cpu" not in backends
    assert "could not be made available" in layerskip_log.text


def test_compiling_with_the_backend_is_refused_with_a_remedy(cpu_build, backends):
    from triton.backends.compiler import GPUTarget

    triton_interpreter.register()
    target = GPUTarget("cpu", 0, 0)
    assert backends["cpu"].compiler.supports_target(target)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backends["cpu"].compiler(target).parse_options({})
