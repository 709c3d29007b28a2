# SPDX-License-Identifier: Apache-2.0
"""What a user asks for: from flags and keys to a checked ``LayerSkipConfig``."""
