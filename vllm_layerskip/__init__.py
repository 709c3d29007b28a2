# SPDX-License-Identifier: Apache-2.0
"""LayerSkip self-speculative decoding for vLLM (arXiv 2404.16710).

Importing this package imports neither vLLM nor torch.
"""

__version__ = "0.1.0"
