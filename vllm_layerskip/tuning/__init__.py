# SPDX-License-Identifier: Apache-2.0
"""Choosing (E, K): agreement of the exits, costs of a step, predictions, and measured cells."""
