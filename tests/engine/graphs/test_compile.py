# SPDX-License-Identifier: Apache-2.0
"""Early and late stage as two compiled units.

Catches a stage that is left uncompiled, and a compile cache that gives one engine the graph
of another exit layer (docs/tests.md, T23).
"""

from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_stages_of_two_exit_layers_in_one_cache(
    pool, checkpoint, prompts, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    expected = pool.get(checkpoint).greedy(prompts[:4], max_tokens=30)
    # The third engine finds the first one's graphs in the cache.
    for exit_layer, max_num_seqs in ((3, 4), (6, 4), (3, 5)):
        engine = pool.layerskip(
            checkpoint, exit_layer, 4, enforce_eager=False, max_num_seqs=max_num_seqs
        )
        with engine.counting() as counts:
            assert engine.greedy(prompts[:4], max_tokens=30) == expected
        counts.assert_speculated()
        assert counts.num_verify_steps_reused > 0
        for stage in engine.runner.model._stages:
            assert not stage.do_not_compile
            assert stage.compiled
    assert any((tmp_path / "torch_compile_cache").rglob("*"))
