# SPDX-License-Identifier: Apache-2.0
"""Each supported architecture on a tiny random checkpoint: plain decoding's tokens.

Catches a family whose embeddings, residual stream or last norm differ from vLLM's own loop, a
draft head that differs from the model's head, and a stage that loses a layer.
"""

from __future__ import annotations

import json

import pytest
from engines import EnginePool
from families import FAMILIES, TINY, random_checkpoint

PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]


pytestmark = pytest.mark.usefixtures("many_small_engines")


@pytest.fixture
def engines():
    """Few engines at a time: there are many families."""
    pool = EnginePool()
    yield pool
    pool.close()


# The default run has their classes under another name.
SLOW = ("LLaMAForCausalLM", "Ministral3ForCausalLM", "CohereForCausalLM")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES],
)
def test_greedy_equals_plain_decoding(engines, tmp_path, architecture):
    model = random_checkpoint(tmp_path / "model", architecture)
    expected = engines.get(model).greedy(PROMPTS, max_tokens=20)
    engine = engines.layerskip(model, 2, 3)
    for reuse in (True, False):
        # Read at each step. (A graph would freeze it; on a CPU there is none.)
        engine.vllm_config.speculative_config.reuse_exit_states = reuse
        engine.reset_prefix_cache()
        with engine.counting() as counts:
            assert engine.greedy(PROMPTS, max_tokens=20) == expected
        counts.assert_speculated()
        assert counts.num_accepted_tokens < counts.num_draft_tokens, "nothing was rejected"
        assert (counts.num_verify_steps_reused > 0) == reuse


@pytest.mark.parametrize(
    "architecture",
    [
        "Gemma2ForCausalLM",  # The embedding as head, and a soft cap.
        "CohereForCausalLM",  # The embedding as head, and a scale.
        "MiMoForCausalLM",  # A norm in front of the head.
        "GraniteForCausalLM",  # A scale.
    ],
)
def test_a_draft_vocabulary_of_all_ids_drafts_the_same(engines, tmp_path, architecture):
    """The draft head's logits and argmax are those of the model's own head."""
    model = random_checkpoint(tmp_path / "model", architecture)
    (tmp_path / "ids").write_text(json.dumps(list(range(TINY["vocab_size"]))))
    drafts = []
    for spec in (
        {},
        {"draft_vocab": str(tmp_path / "ids")},
        {"draft_vocab": str(tmp_path / "ids"), "draft_sample_method": "probabilistic"},
    ):
        engine = engines.layerskip(model, 2, 3, spec=spec)
        with engine.counting() as counts:
            tokens = engine.greedy(PROMPTS, max_tokens=20)
        counts.assert_speculated()
        drafts.append((tokens, counts.drafts))
    assert drafts[1] == drafts[0]
    assert drafts[2] == drafts[0]
