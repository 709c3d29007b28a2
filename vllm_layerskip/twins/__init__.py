# SPDX-License-Identifier: Apache-2.0
"""Other weights for the layers that draft: what they may be, and their arithmetic. Free of vLLM."""
