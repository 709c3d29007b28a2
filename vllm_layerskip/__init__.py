# SPDX-License-Identifier: Apache-2.0
"""LayerSkip self-speculative decoding for vLLM (arXiv 2404.16710).

Importing this package imports neither vLLM nor torch.
"""

from pathlib import Path

__version__ = "0.1.0"

__all__ = ["__version__", "embedded_checkpoint"]


def embedded_checkpoint() -> Path:
    """Folder of the small LayerSkip-trained Llama that ships with the package."""
    return Path(__file__).parent / "checkpoint"
