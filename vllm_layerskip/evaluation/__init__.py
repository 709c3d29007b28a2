# SPDX-License-Identifier: Apache-2.0
"""What each exit of a model knows: scores, agreement, reports, plots.

``evaluate.evaluate`` is ``vllm-layerskip eval``.
"""
