# SPDX-License-Identifier: Apache-2.0
"""Wrappers around vLLM's functions; none replaces vLLM's code.

A wrapper hands every engine that did not ask for LayerSkip to the wrapped function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm_layerskip.host.contacts import MODEL_RUNNER_MODULE

_WRAPPED = "_vllm_layerskip_wrapped"


def wrap(owner: Any, name: str, make_wrapper: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make_wrapper(original)``, once; keep its kind of method."""
    static = inspect.getattr_static(owner, name)
    original = static.__func__ if isinstance(static, staticmethod | classmethod) else static
    if getattr(original, _WRAPPED, False):
        return
    wrapper = functools.wraps(original)(make_wrapper(original))
    setattr(wrapper, _WRAPPED, True)
    if isinstance(static, staticmethod | classmethod):
        setattr(owner, name, type(static)(wrapper))
    else:
        setattr(owner, name, wrapper)


def wrap_init_speculator(make_wrapper: Callable[[Callable], Callable]) -> None:
    """Wrap ``init_speculator`` where the runner will find it.

    The runner binds it by name when it is imported, which is after plugins are loaded. If the
    runner is imported already, its own name is rebound.
    """
    package: Any = importlib.import_module("vllm.v1.worker.gpu.spec_decode")
    original = package.init_speculator
    wrap(package, "init_speculator", make_wrapper)
    runner: Any = sys.modules.get(MODEL_RUNNER_MODULE)
    if runner is not None and getattr(runner, "init_speculator", None) is original:
        runner.init_speculator = package.init_speculator
