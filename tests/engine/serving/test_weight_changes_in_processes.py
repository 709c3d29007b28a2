# SPDX-License-Identifier: Apache-2.0
"""A call that may change weights is counted in the model, with vLLM's processes around it.

Catches an executor whose calls are not announced: exit states would outlive their weights
(``features/test_weight_changes`` shows what then happens, in one process).
"""

from __future__ import annotations

import operator

from engines import ENGINE_DEFAULTS
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def test_calls_are_counted_in_a_worker_of_its_own(checkpoint, prompts, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    llm = LLM(
        str(checkpoint),
        **ENGINE_DEFAULTS,
        distributed_executor_backend="mp",
        speculative_config={"method": "layerskip", "exit_layer": 3, "num_speculative_tokens": 4},
    )

    def changes() -> int:
        (count,) = llm.apply_model(operator.attrgetter("num_weight_changes"))
        return count

    try:
        first = changes()
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        llm.generate(TokensPrompt(prompt_token_ids=prompts[0]), params, use_tqdm=False)
        assert changes() == first + 1, "a step was counted, or a user's call was not"
        llm.collective_rpc("reload_weights")
        assert changes() == first + 4  # The reload, its load_weights, and this call.
    finally:
        llm.llm_engine.engine_core.shutdown()
