# SPDX-License-Identifier: Apache-2.0
"""Real prompts, by category: acceptance and speed-up."""
