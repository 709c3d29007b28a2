# SPDX-License-Identifier: Apache-2.0
"""Contact with vLLM's internals: what we touch, whether it fits, how we wrap it.

Importing this package imports no vLLM.
"""
