# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, run from the root of a checkout: ``python -m benchmarks.decode.compare``."""
