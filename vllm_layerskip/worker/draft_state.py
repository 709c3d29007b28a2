# SPDX-License-Identifier: Apache-2.0
"""What drafting leaves for verification, in one object.

The model makes it when it is built. The speculator and the model state take it from the model, so
all three hold the same one.
"""

from __future__ import annotations

from torch import nn
from vllm.config import VllmConfig

from vllm_layerskip.worker.exit_states import ExitStates
from vllm_layerskip.worker.lora_rows import LoraRows


class DraftState:
    """Exit states by request slot and, with LoRA, the adapter of each slot.

    Args:
        model: the target; vLLM wraps its layers for LoRA after it is built.
    """

    def __init__(self, vllm_config: VllmConfig, model: nn.Module) -> None:
        config, model_config = vllm_config.speculative_config, vllm_config.model_config
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.exit_states = ExitStates(
            max_num_reqs,
            # Without reuse nobody reads them.
            config.num_speculative_tokens if config.reuse_exit_states else 0,
            model_config.get_hidden_size(),
            model_config.dtype,
            # Not the default device: weights may be loaded on another one.
            vllm_config.device_config.device,
        )
        self.lora_rows = None if vllm_config.lora_config is None else LoraRows(model, max_num_reqs)
