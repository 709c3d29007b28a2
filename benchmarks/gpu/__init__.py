# SPDX-License-Identifier: Apache-2.0
"""The one command of a GPU session, and its parts."""
