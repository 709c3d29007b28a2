# SPDX-License-Identifier: Apache-2.0
"""The hot path: drafting, the decision to reuse, and the buffers between them."""
