# SPDX-License-Identifier: Apache-2.0
"""A package, so that its files may share names with those of tests/engine."""
