# SPDX-License-Identifier: Apache-2.0
"""Model classes in two stages, and those cut at an exit layer.

Importing this package imports no vLLM.
"""

from vllm_layerskip.architectures import register_architecture

__all__ = ["register_architecture"]
