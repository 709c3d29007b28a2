# SPDX-License-Identifier: Apache-2.0
"""Modes side by side at set batch sizes: measuring, limits, a table."""
