# SPDX-License-Identifier: Apache-2.0
"""``vllm bench serve`` against a server of each mode."""
