# SPDX-License-Identifier: Apache-2.0
"""`vllm-layerskip eval` of a real model: what each of its exits knows, and its draft twins'."""

from __future__ import annotations

import json

import pytest

from vllm_layerskip.commands.main import main
from vllm_layerskip.example_model.drafts import FOLDER, shipped_drafts
from vllm_layerskip.twins.adapter_config import read_record

NUM_LAYERS = 30
OUTPUTS = {"json": "scores.json", "markdown": "scores.md", "plot": "scores.png"}
ADAPTED = [draft.name for draft in shipped_drafts()]
TEXT = """\
The water cycle describes how water moves on, above and below the surface of the Earth. The sun
warms the oceans, and some of their water evaporates into the air. Rising air takes the vapour up
into the atmosphere, where cooler temperatures cause it to condense into clouds. Currents move the
clouds around the globe; their particles collide, grow, and fall out of the sky as rain or snow.
Some of the snow can accumulate as ice caps and glaciers, which may store frozen water for thousands
of years. Most of the rain falls back into the oceans or onto land, where it flows over the ground
into rivers. A part of it soaks into the soil, and plants take it up with their roots.
"""


@pytest.fixture(scope="module")
def evaluated(example, tmp_path_factory):
    """Each model's exits, of an evaluation with these options."""

    def exits(*options):
        folder = tmp_path_factory.mktemp("eval")
        (folder / "text.txt").write_text(TEXT)
        outputs = [f"--{name}={folder / file}" for name, file in OUTPUTS.items()]
        command = ["eval", "--model", str(example), "--data", str(folder / "text.txt")]
        assert main([*command, "--seq-len", "256", *outputs, *map(str, options)]) == 0
        assert (folder / OUTPUTS["plot"]).read_bytes().startswith(b"\x89PNG")
        table = (folder / OUTPUTS["markdown"]).read_text().splitlines()
        assert len(table) == 2 + NUM_LAYERS
        result = json.loads((folder / OUTPUTS["json"]).read_text())
        assert result["data"]["num_scored_tokens"] > 100
        return [model["exits"] for model in result["models"]]

    return exits


def assert_deeper_is_better(exits):
    """A model that was not trained for it: its early exits know nothing, the last ones much."""
    assert len(exits) == NUM_LAYERS
    agreement = [score["agreement"] for score in exits]
    assert max(agreement[:10]) < 0.2 < 0.3 < agreement[-2] < agreement[-1]
    thirds = [sum(agreement[start : start + 10]) for start in (0, 10, 20)]
    assert thirds == sorted(thirds)
    assert exits[-1]["perplexity"] < exits[-3]["perplexity"] < exits[9]["perplexity"]


def test_exits_of_the_model(evaluated, capsys):
    (exits,) = evaluated()
    assert_deeper_is_better(exits)
    assert exits[-1]["agreement"] == 1.0
    assert exits[-1]["perplexity"] < 20
    assert "Early exits on held-out text" in capsys.readouterr().out


def test_exits_of_the_model_and_of_its_int4_twin(evaluated):
    own, twin = evaluated("--draft-quantization", "int4")
    assert_deeper_is_better(own)
    assert_deeper_is_better(twin)
    # With the model's last layer, of the twin as well.
    assert 0.45 < twin[-1]["agreement"] < own[-1]["agreement"] == 1.0
    assert own[-1]["perplexity"] < twin[-1]["perplexity"] < 2.5 * own[-1]["perplexity"]


@pytest.mark.parametrize(
    "name", ADAPTED or [pytest.param("", marks=pytest.mark.skip("none ships"))]
)
def test_a_shipped_adapter_knows_more_at_its_exit(example, evaluated, name):
    folder = example / FOLDER / name
    exit_layer = read_record(folder).exit_layer
    own, adapted = evaluated("--draft-adapter", folder)
    assert exit_layer is not None
    assert exit_layer < NUM_LAYERS
    assert adapted[exit_layer - 1]["agreement"] > own[exit_layer - 1]["agreement"] + 0.1
