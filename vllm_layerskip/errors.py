# SPDX-License-Identifier: Apache-2.0
"""The error for what a user can correct."""


class UserError(Exception):
    """A mistake that its user can correct; the message says how."""
