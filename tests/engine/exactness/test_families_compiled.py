# SPDX-License-Identifier: Apache-2.0
"""Compiled stages of families whose loop over the layers is not Llama's.

Catches a part of the loop that torch.compile cannot trace, and a model that vLLM would compile
as a whole, with the choice between its two stages frozen.
"""

from __future__ import annotations

import pytest
from families import random_checkpoint

PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "architecture",
    [
        "Ernie4_5ForCausalLM",  # vLLM compiles it as a whole.
        "Gemma2ForCausalLM",  # Scaled embeddings, two KV cache groups.
        "GraniteForCausalLM",  # One residual stream.
        "MiMoForCausalLM",  # Its norm belongs to the head.
    ],
)
def test_compiled_stages(pool, tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = random_checkpoint(tmp_path / "model", architecture)
    expected = pool.get(model).greedy(PROMPTS, max_tokens=20)
    engine = pool.layerskip(model, 2, 3, enforce_eager=False)
    with engine.counting() as counts:
        assert engine.greedy(PROMPTS, max_tokens=20) == expected
    counts.assert_speculated()
    assert counts.num_verify_steps_reused > 0
    for stage in engine.runner.model._stages:
        assert not stage.do_not_compile
        assert stage.compiled
    assert getattr(engine.runner.model, "do_not_compile", True)
