# SPDX-License-Identifier: Apache-2.0
"""All contact with vLLM's internals: what is touched, whether it fits, how it is wrapped.

Importing this package imports no vLLM.
"""
