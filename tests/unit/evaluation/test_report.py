# SPDX-License-Identifier: Apache-2.0
"""Catch tables that do not show their result, and a page that shows another result."""

import json
import math
from pathlib import Path

import pytest

import vllm_layerskip
from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation import report

DOCS = Path(__file__).parents[3] / "docs"
MODEL = Path(vllm_layerskip.__file__).parent / "checkpoint"


def test_models_of_different_depth_share_a_table_and_overflow_is_no_nan(tmp_path):
    def model(label, perplexities):
        exits = [
            {"exit_layer": i, "perplexity": p, "accuracy": 0.5, "agreement": 1.0}
            for i, p in enumerate(perplexities, start=1)
        ]
        return {"label": label, "exits": exits}

    result = {
        "kind": report.KIND,
        "models": [model("a", [math.inf, 218000.4]), model("b", [22.1349])],
    }
    report.write_json(result, tmp_path / "r.json")
    rows = report.rows(report.read_json(tmp_path / "r.json"))
    assert [row[1:3] for row in rows] == [["inf", "22.13"], ["218000", "-"]]


def test_a_file_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(UserError, match="--from-json"):
        report.read_json(tmp_path / "none.json")


def test_the_documented_table_is_the_stored_result():
    result = report.read_json(DOCS / "data" / "eval-embedded.json")
    page = (DOCS / "evaluation.md").read_text()
    assert report.markdown(result) in page
    assert report.summary(result) in page


def test_the_stored_result_scores_the_checkpoint_that_ships():
    """The card scored the same text, its last, incomplete window aside."""
    result = report.read_json(DOCS / "data" / "eval-embedded.json")
    card = json.loads((MODEL / "scores.json").read_text())["layerskip"]["exits"]
    (model,) = (model for model in result["models"] if model["label"] == "LayerSkip")
    for score, expected in zip(model["exits"], card, strict=True):
        assert score["accuracy"] == pytest.approx(expected["accuracy"], abs=2e-3)
        assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-2)
