# SPDX-License-Identifier: Apache-2.0
"""Early and late stage in vLLM's own compile backend: split, compiled, cached, captured, let go.

Catches what ``test_compile.py`` cannot, as vLLM's CPU platform never uses that backend: a late
stage that reads its inputs from a graph's memory or elsewhere at each step, a unit that cannot
be saved or takes the other one's place in the cache, a piecewise graph that disturbs a draft,
dynamic shapes that break a trace, and a stage that outlives its engine.

The model runs in processes of its own, because the tests change vLLM's platform for good.
``compiled_units.py`` says what stands in for a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import ON_GPU
from processes import run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(ON_GPU, reason="a GPU has the real ones: test_cuda_graphs.py"),
]

EAGER_SIZES = [64, 8, 2, 1]
CAPTURE_SIZES = [8, 4, 2, 1]
NUM_REPLAYS = 3
TAGS = {"layerskip_early", "layerskip_late"}
# In float32, relative to the largest value.
ROUNDING = 1e-5
# A unit of two layers: what comes before, between and after its two attentions.
NUM_PIECES = 3


@dataclass
class Starts:
    """Two processes, one after the other, with one cache."""

    uses_aot: bool
    cache: Path
    cold: dict[str, Any]
    warm: dict[str, Any]

    @property
    def both(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.cold, self.warm


def start(
    checkpoint: Path,
    folder: Path,
    environment: Mapping[str, str],
    **compilation_config: Any,
) -> dict[str, Any]:
    request = {
        "checkpoint": str(checkpoint),
        "folder": str(folder),
        "compilation_config": compilation_config,
        "eager_sizes": EAGER_SIZES,
        "capture_sizes": CAPTURE_SIZES,
        "num_replays": NUM_REPLAYS,
    }
    (facts,), _ = run_script(
        "compiled_units.py",
        json.dumps(request),
        environment={
            "VLLM_CACHE_ROOT": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            **environment,
        },
    )
    return facts


@pytest.fixture(
    scope="module",
    params=[
        {"VLLM_USE_AOT_COMPILE": "1", "VLLM_USE_MEGA_AOT_ARTIFACT": "1"},
        {"VLLM_USE_AOT_COMPILE": "1", "VLLM_USE_MEGA_AOT_ARTIFACT": "0"},
        {"VLLM_USE_AOT_COMPILE": "0"},
    ],
    # vLLM's defaults for torch 2.12 and 2.11, and what is left if saving a unit fails.
    ids=["one-artifact", "aot", "no-aot"],
)
def starts(request, tmp_path_factory, random_checkpoint) -> Starts:
    folder = tmp_path_factory.mktemp("units")
    cold, warm = (start(random_checkpoint, folder, request.param) for _ in range(2))
    uses_aot = request.param["VLLM_USE_AOT_COMPILE"] == "1"
    return Starts(uses_aot, folder / "torch_compile_cache", cold, warm)


def assert_outputs_are_eager_outputs(facts: dict[str, Any]) -> None:
    differences = facts["outputs"]["eager"]
    assert differences.keys() == {str(size) for size in EAGER_SIZES}
    assert all(difference < ROUNDING for difference in differences.values()), differences


def assert_replays_equal_runs_without_graphs(facts: dict[str, Any]) -> None:
    differences = facts["outputs"]["piecewise"]
    assert differences.keys() == {str(size) for size in CAPTURE_SIZES}
    for of_size in differences.values():
        assert len(of_size) == 1 + NUM_REPLAYS
        assert all(difference < ROUNDING for difference in of_size), differences
    graphs = facts["outputs"]["graphs"]
    assert graphs["pieces"] == 2 * NUM_PIECES
    assert graphs["captures"] == graphs["pieces"] * len(CAPTURE_SIZES)
    assert graphs["replays"] == graphs["captures"] * NUM_REPLAYS


def test_compiled_outputs_are_eager_outputs(starts):
    for facts in starts.both:
        assert facts["mode"] == "VLLM_COMPILE"
        assert_outputs_are_eager_outputs(facts)


def test_piecewise_graphs_replay_what_is_computed_without_them(starts):
    for facts in starts.both:
        assert_replays_equal_runs_without_graphs(facts)


def test_the_late_stage_needs_inputs_of_its_own(starts):
    """Negative control: the stand-in notices a late stage without inputs of its own."""
    for facts in starts.both:
        # The early stage's last graph lends its outputs, until the late stage's first one runs.
        assert math.isnan(facts["bypassed"]["own memory"])
        # States gathered from the exit states lie elsewhere in each step.
        assert facts["bypassed"]["a copy"] == "inputs are not where they were at capture"


def test_a_draft_of_one_row_runs_past_the_graphs(starts):
    for facts in starts.both:
        before, after = (facts["outputs"][name] for name in ("graphs", "graphs after a draft"))
        assert facts["outputs"]["draft"] < ROUNDING
        assert after == {**before, "without": before["without"] + NUM_PIECES}


def test_each_unit_is_compiled_and_saved_for_itself(starts):
    counter = starts.cold["counter"]
    assert counter["num_graphs_seen"] == 2
    # With the two attentions of each unit between its pieces.
    assert counter["num_piecewise_graphs_seen"] == 2 * (NUM_PIECES + 2)
    assert counter["num_piecewise_capturable_graphs_seen"] == 2 * NUM_PIECES
    assert counter["num_inductor_compiles"] == 2 * NUM_PIECES
    assert counter["num_aot_artifacts_saved"] == (2 if starts.uses_aot else 0)
    assert starts.cold["loaded"] == dict.fromkeys(TAGS, False)

    artifacts = list(starts.cache.glob("torch_aot_compile/*/rank_0_0/model"))
    assert len(artifacts) == (2 if starts.uses_aot else 0)
    # One folder for both starts: the second one's settings and sources have the same hash.
    (folder,) = starts.cache.glob("*/rank_0_0")
    assert {path.name for path in folder.iterdir()} == TAGS


def test_a_second_process_loads_both_units(starts):
    counter = starts.warm["counter"]
    assert counter["num_inductor_compiles"] == 0
    assert counter["num_aot_compiles"] == 0
    assert counter["num_compiled_artifacts_loaded"] == 2 * NUM_PIECES
    assert counter["num_aot_artifacts_loaded"] == (2 if starts.uses_aot else 0)
    assert starts.warm["loaded"] == dict.fromkeys(TAGS, starts.uses_aot)


def test_an_engine_is_let_go_with_its_stages(starts):
    """A hook into Dynamo holds each unit: with it the model, its weights and its graphs."""
    for facts in starts.both:
        before = facts["hooks before"]
        assert facts["hooks"] == before + 3  # One is the backbone's, which is never run.
        # vLLM must find more than the module tree has.
        assert facts["let go"]["without stages"] == {"hooks": before + 2, "freed": False}
        assert facts["let go"]["with stages"] == {"hooks": before, "freed": True}


def test_dynamic_shapes_may_be_unbacked(random_checkpoint, tmp_path):
    """Unbacked, arguments can be traced only if their number of tokens has one common name."""
    facts = start(
        random_checkpoint,
        tmp_path,
        {"VLLM_CPU_CI_ENV": "1"},  # vLLM's backend without Inductor: the trace is what matters.
        dynamic_shapes_config={"type": "unbacked"},
    )
    assert facts["counter"]["num_eager_compiles"] == 2 * NUM_PIECES
    assert_outputs_are_eager_outputs(facts)
    assert_replays_equal_runs_without_graphs(facts)
