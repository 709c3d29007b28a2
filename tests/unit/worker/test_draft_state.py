# SPDX-License-Identifier: Apache-2.0
"""Catch exit states on the device of the loader, or adapters where there is no LoRA."""

from types import SimpleNamespace

import pytest
import torch

from vllm_layerskip.worker.draft_state import DraftState


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("lora_config", [None, object()], ids=["base", "lora"])
def test_the_state_is_on_the_engines_device_and_has_adapters_with_lora_alone(lora_config, reuse):
    vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=3, reuse_exit_states=reuse),
        model_config=SimpleNamespace(get_hidden_size=lambda: 8, dtype=torch.bfloat16),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        lora_config=lora_config,
    )
    with torch.device("meta"):  # As load_config.device and some load formats do.
        state = DraftState(vllm_config, torch.nn.Module())
    assert state.exit_states.states.device.type == "cpu"
    assert state.exit_states.states.shape == (2, 4, 3 if reuse else 0, 8)
    assert (state.exit_states.num_bytes > 0) == reuse
    assert state.exit_states.states.dtype == torch.bfloat16
    assert (state.lora_rows is None) == (lora_config is None)
