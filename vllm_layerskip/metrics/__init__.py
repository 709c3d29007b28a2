# SPDX-License-Identifier: Apache-2.0
"""Counts of drafts and verify steps, from the workers to whoever asks."""
