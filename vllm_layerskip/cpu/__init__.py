# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on a CPU: Triton's interpreter, and torch functions in place of kernels."""
