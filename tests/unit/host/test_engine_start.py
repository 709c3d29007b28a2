# SPDX-License-Identifier: Apache-2.0
"""Catch a mistake of a user that is no line, and a bug that loses its traceback.

tests/unit/commands/test_mistakes.py has the mistakes that vLLM finds in its arguments.
"""

from __future__ import annotations

import sys

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.host.engine_start import Given, check_engine, start_engine, start_mistake


@pytest.fixture
def engine(monkeypatch):
    """``fail(function)``: what runs in place of the engine, after all checks."""
    from vllm.v1.engine.llm_engine import LLMEngine

    def fail(function):
        code = "def __init__(self, *args, **kwargs):\n    function()"
        namespace = {"function": function}
        exec(code, namespace)
        method = namespace["__init__"]
        method.__code__ = method.__code__.replace(co_qualname=LLMEngine.__init__.__qualname__)
        monkeypatch.setattr(LLMEngine, "__init__", method)

    return fail


@pytest.fixture
def given(checkpoint):
    return Given({
        "model": checkpoint, "skip_tokenizer_init": True, "dtype": "float32",
        "speculative_config": {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 2},
    })  # fmt: skip


def raises(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    "message",
    [
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
        "CUDA out of memory. Tried to allocate 2 GiB.",
        "The checkpoint lacks 2 weight(s): a, b. Copy or download it again.",
    ],
)
def test_what_a_user_can_mend_is_one_line(engine, given, message):
    engine(raises(ValueError(message)))
    with pytest.raises(UserError) as failed:
        start_engine(given)
    assert str(failed.value) == f"the engine could not start: {message}"


def test_the_cause_in_another_process_is_found_in_its_output(engine, given):
    def function():
        print("(EngineCore pid=1) ERROR 11-27 17:59:22 [core.py:1] ValueError: No available memory "
              "for the cache blocks.", file=sys.__stderr__, flush=True)  # fmt: skip
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    engine(function)
    with pytest.raises(UserError, match=r"^the engine could not start: No available memory for"):
        start_engine(given)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        RuntimeError("Engine core initialization failed. See root cause above."),
        TypeError("a bug"),
    ],
)
def test_a_bug_in_the_engine_keeps_its_traceback(engine, given, error):
    engine(raises(error))
    with pytest.raises(type(error)) as failed:
        start_engine(given)
    assert failed.value is error


def test_a_bug_of_ours_in_the_checks_keeps_its_traceback(given, monkeypatch):
    from vllm_layerskip.config import layerskip_config

    monkeypatch.setattr(layerskip_config, "check_request", None)
    with_arguments = Given(given.arguments, engine_args={"seed": 1})
    for one in (given, with_arguments):
        with pytest.raises(TypeError) as failed:
            check_engine(one)
        assert not isinstance(failed.value, UserError)


def test_what_is_right_passes(given):
    check_engine(given)


@pytest.mark.parametrize("text", ["", "ValueError: a bug"])
def test_other_errors_are_no_mistakes(text):
    assert start_mistake(text) is None
