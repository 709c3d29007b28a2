# SPDX-License-Identifier: Apache-2.0
"""Start vLLM's ``LLM``, with a user's mistakes in one line.

vLLM checks its arguments in this process before it starts the engine; an error from there is
the user's, unless our own code broke. What fails later fails in the engine, which may be another
process that logs the cause; of those errors only the known ones of ``_START_ERRORS`` are a
user's. Whatever else fails is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.errors import UserError, one_line
from vllm_layerskip.host.process_output import kept_lines, last_error, output_kept

if TYPE_CHECKING:
    from vllm import LLM

_PACKAGE = Path(__file__).parents[1]
_START_ERRORS = re.compile(
    r"No available memory for the cache blocks|larger than the available KV cache|"
    r"less than desired [CG]PU memory|less than requested memory for kv|out of memory|"
    r"CUDA error: invalid device ordinal|"
    r"instantiate the backend tokenizer|[Cc]an't load tokenizer|"
    r"weights were not initialized from|Cannot find any model weights|lacks \d+ weight|"
    r"has no kernel for it|changes none of the layers|the adapter changes "
)
"""vLLM's and our errors after its arguments are checked that a user can do something about."""
_MISUSE = (TypeError, AttributeError, KeyError, AssertionError)
"""What vLLM runs into when ``--engine-args`` has a value of a type that it does not expect."""
_CLASS = re.compile(r"^[\w.]+: ")
_ELSEWHERE = "initialization failed"
"""In vLLM's error where the engine, which is another process, did not start."""


@dataclass(frozen=True)
class Given:
    """Arguments of ``LLM``, and the options that a user gave them with."""

    arguments: Mapping[str, Any]
    options: Mapping[str, str] = field(default_factory=dict)
    """The options on the command line, with their values, by the names of their arguments, such
    as ``"max_model_len": "--max-model-len 99"``."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """The arguments that came with ``--engine-args``."""

    def option(self, name: str) -> str:
        """What to call an argument in a message."""
        if name in self.engine_args:
            return f"--engine-args: {name}={self.engine_args[name]!r}"
        return self.options.get(name, name)

    @property
    def names(self) -> list[str]:
        return [*self.options, *self.engine_args]


def start_engine(given: Given) -> LLM:
    """vLLM's ``LLM`` with these arguments.

    Raises:
        UserError: vLLM refuses an argument, or the engine cannot start for a reason that a user
            can remove; the message names the option.
    """
    from vllm import LLM

    _check_names(given)
    output = kept_lines()
    with _mistakes_reported(given, output), output_kept(output):
        return LLM(**given.arguments)


def check_engine(given: Given) -> None:
    """Have vLLM check the arguments of ``LLM``, and start nothing.

    Raises:
        UserError: it refuses one.
    """
    from vllm.engine.arg_utils import EngineArgs

    _check_names(given)
    with _mistakes_reported(given):
        EngineArgs(**given.arguments).create_engine_config()


def _check_names(given: Given) -> None:
    import inspect

    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    # LLM hands what it does not know to EngineArgs.
    valid = {*inspect.signature(LLM).parameters, *inspect.signature(EngineArgs).parameters}
    for name in given.engine_args:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            meant = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise UserError(f"--engine-args: {name} is no argument of vLLM's LLM. {meant}")


@contextmanager
def _mistakes_reported(given: Given, output: Sequence[str] = ()) -> Iterator[None]:
    """Turn vLLM's errors about what a user gave into ``UserError``.

    Args:
        output: what the engine's processes have written so far.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _mistake(error, given, output)
        if message is None:
            raise
        raise UserError(message) from None


def _mistake(error: Exception, given: Given, output: Sequence[str]) -> str | None:
    """An error in one line, as a mistake of the user; None if it is none."""
    if _is_from_the_engine(error):
        reason = one_line(error)
        # Where the cause is in another process, that one has written it.
        return start_mistake((last_error(output) or "") if _ELSEWHERE in reason else reason)
    if isinstance(error, _MISUSE):
        if not given.engine_args or _is_from_our_code(error):
            return None
        values = ", ".join(f"{name}={value!r}" for name, value in given.engine_args.items())
        return f"--engine-args: vLLM cannot use {values} ({type(error).__name__}: {error})."
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError) or _is_of_the_hub(
        error
    ):
        return _config_mistake(error, given)
    return None


def _is_from_the_engine(error: Exception) -> bool:
    """Whether all arguments were checked already."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_qualname == "LLMEngine.__init__" for frame, _ in frames)


def _is_of_the_hub(error: Exception) -> bool:
    """Whether there is no such checkpoint, or its config has values that do not go together."""
    return type(error).__module__.startswith("huggingface_hub")


def _is_from_our_code(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _PACKAGE in Path(frame.f_code.co_filename).parents


def _config_mistake(error: Exception, given: Given) -> str:
    """What vLLM or LayerSkip says about an argument, headed by the option if one is meant."""
    problems = list(_problems(error))
    for argument, reason in problems:
        name = _given_name(argument, reason, given)
        if name is not None:
            return f"{given.option(name)}: {reason}."
    if isinstance(error, OSError) or _is_of_the_hub(error):
        return (
            f"--model {given.arguments['model']}: no checkpoint could be read ({one_line(error)}). "
            "Give a folder with config.json, weights and tokenizer, or a name on the model hub."
        )
    argument, reason = problems[0]
    return f"{argument}: {reason}." if argument else f"{reason}."


def _problems(error: Exception) -> Iterator[tuple[str, str]]:
    """Arguments (empty if they are not said), and what is wrong with each."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        yield "", one_line(error).rstrip(".")
        return
    for part in error.errors(include_url=False, include_context=False):
        reason = " ".join(part["msg"].removeprefix("Value error, ").split()).rstrip(".")
        yield str(part["loc"][0]) if part["loc"] else "", reason


def _given_name(argument: str, reason: str, given: Given) -> str | None:
    """The argument that the user gave and a problem is about, by its name or its value."""
    if argument in given.names:
        return argument
    for name in given.names:
        if re.search(rf"\b{name.replace('_', '[_ ]')}\b", reason):
            return name
    for name, value in given.engine_args.items():
        if isinstance(value, dict) and argument in value:
            return name
        # Of "package.module.Class" the package may be what is missing.
        if isinstance(value, str) and (value in reason or f"'{value.split('.')[0]}'" in reason):
            return name
    return None


def start_mistake(reason: str) -> str | None:
    """An error of an engine's start as a mistake of the user, in one line; None if it is none."""
    if not _START_ERRORS.search(reason):
        return None
    return f"the engine could not start: {_CLASS.sub('', reason).rstrip('.')}."
