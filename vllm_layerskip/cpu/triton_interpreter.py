# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter usable by vLLM on a CPU (``TRITON_INTERPRET=1``).

Model Runner V2's kernels are Triton kernels, and vLLM on a CPU uses Triton only when
Triton lists a backend named ``cpu``. With ``TRITON_INTERPRET=1`` no kernel is ever
compiled, so a backend that merely says it is there is enough.

Why it is safe: vLLM calls platform plugins before it looks at Triton, in every process,
and a plugin that returns None selects no platform. The backend is added only in
interpret mode, only for a CPU build of vLLM, and never over a real ``cpu`` backend
(triton-cpu). Nothing is written to Triton's installation, and processes that do not use
vLLM never get here.
"""

from __future__ import annotations

import os
from dataclasses import replace

BACKEND_NAME = "cpu"


def interpret_mode() -> bool:
    """Whether ``TRITON_INTERPRET`` is set, by Triton's own rule for booleans."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def register() -> None:
    """Entry point of ``vllm.platform_plugins``. Never raises, never selects a platform."""
    if not interpret_mode():
        return
    try:
        _add_backend()
    except Exception:
        # vLLM then runs without Triton, and a LayerSkip request is refused with a remedy.
        import logging

        logging.getLogger("vllm.layerskip").warning(
            "Triton's interpreter could not be made available to vLLM.", exc_info=True
        )


def _add_backend() -> None:
    from vllm.platforms import vllm_version_matches_substr

    if not vllm_version_matches_substr("cpu"):
        return
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    if BACKEND_NAME in backends:
        return

    class InterpreterDriver(DriverBase):
        """Reports that it is active; Triton's interpreter takes each launch before asking it."""

        @classmethod
        def is_active(cls) -> bool:
            return interpret_mode()

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise _never_compiles()

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(BACKEND_NAME, 0, 0)

        def get_active_torch_device(self):  # type: ignore[no-untyped-def]
            import torch

            return torch.device("cpu")

        def get_benchmarker(self):  # type: ignore[no-untyped-def]
            from triton.testing import do_bench

            return do_bench

    class InterpreterCompiler(BaseBackend):
        """Takes the compiler's place in the table; interpret mode never compiles."""

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return target.backend == BACKEND_NAME

        def hash(self) -> str:
            return "interpreter"

        def parse_options(self, options: dict) -> object:
            raise _never_compiles()

        def add_stages(self, stages, options, language) -> None:  # type: ignore[no-untyped-def]
            raise _never_compiles()

        def load_dialects(self, context) -> None:  # type: ignore[no-untyped-def]
            raise _never_compiles()

        def get_module_map(self) -> dict:
            return {}

    backends[BACKEND_NAME] = Backend(compiler=InterpreterCompiler, driver=InterpreterDriver)
    _skip_overflow_checks()


def _skip_overflow_checks() -> None:
    """Save a third of the interpreter's time: outside of debug mode it ignores the checks."""
    from triton.runtime.interpreter import interpreter_builder

    if not interpreter_builder.options.debug:
        interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


def _never_compiles() -> RuntimeError:
    return RuntimeError(
        "Triton was asked to compile for the CPU, which only works in interpret mode. Set "
        "TRITON_INTERPRET=1 before Python starts."
    )
