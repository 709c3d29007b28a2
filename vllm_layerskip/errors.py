# SPDX-License-Identifier: Apache-2.0
"""The error for what a user can correct."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that its user can correct; the message says how."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, without its full stop; its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def one_line(error: BaseException) -> str:
    """A library's error in one line, however many it has; its class if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a package that is missing into an error that names our extra with it.

    Raises:
        UserError: an import of the block failed.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == __package__:
            raise  # A bug of ours, which no package can mend.
        raise UserError(
            f"{error}. Install the extra: pip install 'vllm-layerskip[{extra}]'"
        ) from None
