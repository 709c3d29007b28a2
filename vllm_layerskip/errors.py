# SPDX-License-Identifier: Apache-2.0
"""The error for what a user can correct."""


class UserError(Exception):
    """A mistake that its user can correct; the message says how."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, for a message of ours; its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
