# SPDX-License-Identifier: Apache-2.0
"""Timing, limits of the hardware, and what a measurement says about its machine."""
